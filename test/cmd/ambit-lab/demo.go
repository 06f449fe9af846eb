package main

import (
	"context"
	"io"
)

func demo(ctx context.Context, o options, stdout, stderr io.Writer) int { return 0 }
