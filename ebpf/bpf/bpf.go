// Package bpf holds the kernel programs that steer a pod's connections, compiled,
// with Go types of their maps. It loads nothing: package redirect does.
//
//	mesh.h    the contract: ports, keys, values, layout
//	maps.h    the maps
//	lease.h   connections that need no proxy, with maps of their own
//	drops.h   what was refused, counted and told
//	origin.h  who opened a connection
//	probe.h   the node's own connections to pods
//	cgroup.c  programs at the pods' cgroup root, at the proxy's cgroup and at cables, per node
//	pod.c     sk_lookup and the packet gate, one instance per pod
//
// `go generate` wants clang, llvm-strip, libbpf's and Linux's headers (Debian:
// clang llvm libbpf-dev), and writes the same bytes with the same clang.
package bpf

//go:generate go tool bpf2go -go-package bpf -target bpfel -cc clang-14 -strip llvm-strip-14 -cflags "-O2 -g -mcpu=v3 -Wall -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu" -type enrolment -type port_range -type destination -type origin -type handover -type capture -type drop_event -type flow -type listener -type alias -type server -type settings -type reason -type enrolment_flag -type lease_key -type lease_target -type lease -type direct -type direct_kind -type direct_event Cgroup cgroup.c
//go:generate go tool bpf2go -go-package bpf -target bpfel -cc clang-14 -strip llvm-strip-14 -cflags "-O2 -g -mcpu=v3 -Wall -Werror -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu" Pod pod.c

// Layout is MESH_LAYOUT: pinned maps of another one are never read.
const Layout = 1
