package report

import "io"

// HTML is a placeholder
func (r *Report) HTML(w io.Writer) error { return nil }
