/* Maps that both objects share, by name. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "mesh.h"

#define AF_INET 2
#define AF_INET6 10

#define TC_PASS (-1) /* TCX_NEXT: the next program decides */
#define TC_DROP 2

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} mesh_settings SEC(".maps");

/* Only the agent writes here. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64); /* netns cookie */
	__type(value, struct enrolment);
} mesh_enrolled SEC(".maps");

/* Most pods leave nothing out: the first look ends it. */
static __always_inline bool excluded(const struct port_range *ranges, __u16 port)
{
	for (int i = 0; i < PORT_RANGES && ranges[i].last; i++)
		if (ranges[i].first <= port && port <= ranges[i].last)
			return true;
	return false;
}

/* Where the app of a captured socket wanted to go. It counts while the socket's peer is an alias: one that connects
 * again keeps it. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct capture);
} mesh_wanted SEC(".maps");

/* The same and who it was, on the socket that the proxy accepted. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct handover);
} mesh_original SEC(".maps");

/* Sockets of the proxy: its cgroup's programs run before those of its parents. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} mesh_own SEC(".maps");

/* From connect to accept, by the alias. An entry that nobody fetched is evicted. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct alias);
	__type(value, struct handover);
} mesh_handover SEC(".maps");

/* Whose address it is: a pod's namespace. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct address);
	__type(value, __u64);
} mesh_pods SEC(".maps");

/* Connections that the proxy is opening: they may leave the pod and reach the app. So may those that the node's own
 * processes open to a pod (probes). The value is until when; 0: until somebody deletes it. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct flow);
	__type(value, __u64); /* by the clock of bpf_ktime_get_ns */
} mesh_dials SEC(".maps");

/* Longer than a SYN takes from the node to the pod, and the ACK that ends a handshake with cookies. A SYN that takes
 * longer is sent again: RFC 6298 section 2. */
#define DIAL_TIME 1000000000ULL

static __always_inline bool is_dial(const struct flow *f)
{
	__u64 *until = bpf_map_lookup_elem(&mesh_dials, f);

	return until && (!*until || bpf_ktime_get_ns() < *until);
}

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct listener);
	__type(value, __u64);
} mesh_listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct alias);
	__type(value, struct server);
} mesh_aliases SEC(".maps");

/* Reads a field of a context where it stands. Left to itself the compiler chooses between two fields' addresses and
 * reads once, which the verifier refuses: a context pointer may not be computed with. */
#define READ(ctx, field)                                                                                          \
	({                                                                                                        \
		__u32 read;                                                                                       \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                                             \
			     : "=r"(read)                                                                         \
			     : "r"(ctx), "i"(__builtin_offsetof(typeof(*(ctx)), field)));                         \
		read;                                                                                             \
	})
#define READ_IP6(ctx, field)                                                                                      \
	(struct address){{READ(ctx, field[0]), READ(ctx, field[1]), READ(ctx, field[2]), READ(ctx, field[3])}}

#define MAPPED bpf_htonl(0xffff)

static __always_inline struct address from_ip4(__be32 ip)
{
	return (struct address){{0, 0, MAPPED, ip}};
}

static __always_inline bool is_ip4(const struct address *a)
{
	return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == MAPPED;
}

static __always_inline bool is_zero(const struct address *a)
{
	return (a->word[0] | a->word[1] | a->word[2] | a->word[3]) == 0;
}

static __always_inline bool same(const struct address *a, const struct address *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
	       a->word[3] == b->word[3];
}

/* Loopback, and the unspecified address, which connect(2) takes for it. */
static __always_inline bool is_loopback(const struct address *a)
{
	if (is_ip4(a))
		return (a->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000) || a->word[3] == 0;
	return a->word[0] == 0 && a->word[1] == 0 && a->word[2] == 0 && (a->word[3] & ~bpf_htonl(1)) == 0;
}

/* Aliases stand for captured destinations: one address for all would leave a pod with one port range, 28 thousand
 * connections. IPv4 has 127.64.0.0/10 for it; IPv6, whose loopback is one address, a /96 that the pod's own
 * routing table calls local. */
#define ALIAS4_NET 0x7f400000
#define ALIAS4_MASK 0xffc00000
#define ALIAS6_0 0xfd169254
#define ALIAS6_1 0x7127a15a
#define ALIAS6_2 0x00000000

static __always_inline bool is_alias(const struct address *a)
{
	if (is_ip4(a))
		return (a->word[3] & bpf_htonl(ALIAS4_MASK)) == bpf_htonl(ALIAS4_NET);
	return a->word[0] == bpf_htonl(ALIAS6_0) && a->word[1] == bpf_htonl(ALIAS6_1) &&
	       a->word[2] == bpf_htonl(ALIAS6_2);
}
