package kubelet

import (
	"fmt"
	"path"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Image is the program that stands for a container image. There is no registry:
// names that guides use are mapped to the sample program, or to the machine's own
// tools.
type Image struct {
	Names      []string // last part of the image's name, without tag
	Entrypoint []string // "ambit-sample" is the sample program beside the lab's
	Cmd        []string
	Sealed     bool // the image's own command lines do not exist here: they are replaced
	About      string
}

// Images are the known ones.
var Images = []Image{
	bookinfo("productpage", "v1", "examples-bookinfo-productpage-v1"),
	bookinfo("details", "v1", "examples-bookinfo-details-v1"),
	bookinfo("details", "v2", "examples-bookinfo-details-v2"),
	bookinfo("ratings", "v1", "examples-bookinfo-ratings-v1"),
	bookinfo("ratings", "v2", "examples-bookinfo-ratings-v2"),
	bookinfo("reviews", "v1", "examples-bookinfo-reviews-v1"),
	bookinfo("reviews", "v2", "examples-bookinfo-reviews-v2"),
	bookinfo("reviews", "v3", "examples-bookinfo-reviews-v3"),
	{Names: []string{"httpbin", "go-httpbin"}, Entrypoint: []string{"ambit-sample", "echo"}, Sealed: true, About: "HTTP echo with httpbin's common paths"},
	{Names: []string{"tcp-echo-server"}, Entrypoint: []string{"ambit-sample", "tcp-echo"}, About: "TCP echo, arguments PORTS PREFIX"},
	{Names: []string{"echo", "echo-server", "echo-basic", "echo-advanced", "http-echo", "app"}, Entrypoint: []string{"ambit-sample", "echo"}, Sealed: true, About: "HTTP, gRPC, TCP and UDP echo"},
	{Names: []string{"ambit-sample"}, Entrypoint: []string{"ambit-sample"}, About: "the sample program itself, any of its roles"},
	{Names: []string{"curl", "sleep", "netshoot", "busybox", "alpine", "debian", "ubuntu", "bash", "iperf3"},
		Cmd: []string{"ambit-sample", "pause"}, About: "the machine's own tools; without a command it waits"},
	{Names: []string{"pause"}, Entrypoint: []string{"ambit-sample", "pause"}, About: "waits"},
}

func bookinfo(role, version, name string) Image {
	return Image{Names: []string{name}, Entrypoint: []string{"ambit-sample", role, "--version", version}, Sealed: true, About: "bookinfo's " + role + " " + version}
}

// UnknownImageError says which images there are.
type UnknownImageError struct{ Image string }

func (e *UnknownImageError) Error() string {
	var names []string
	for _, i := range Images {
		names = append(names, i.Names...)
	}
	return fmt.Sprintf("image %q is unknown to the lab, which pulls nothing; known: %s", e.Image, strings.Join(names, ", "))
}

// command is the command line of a container.
func command(c *corev1.Container) ([]string, error) {
	name := path.Base(c.Image)
	name, _, _ = strings.Cut(name, "@")
	name, _, _ = strings.Cut(name, ":")
	i := slices.IndexFunc(Images, func(i Image) bool { return slices.Contains(i.Names, name) })
	if i < 0 {
		return nil, &UnknownImageError{c.Image}
	}
	img := Images[i]
	if img.Sealed && (len(c.Command) == 0 || path.Base(c.Command[0]) != "ambit-sample") {
		return img.Entrypoint, nil
	}
	entry, args := img.Entrypoint, img.Cmd
	if len(c.Command) > 0 {
		entry, args = c.Command, nil
	}
	if len(c.Args) > 0 {
		args = c.Args
	}
	return slices.Concat(entry, args), nil
}
