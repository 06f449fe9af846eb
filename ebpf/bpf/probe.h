/* The node's own connections to its pods, which are kubelet's probes: they meet no policy and keep the node's
 * address. They are told from others' where a pod's cable begins, so that nobody but the pods of the mesh pays.
 *
 *	kubelet: SYN ── node_probe ──▶ mesh_dials[its flow] ── pod_lookup ──▶ app
 */
#pragma once

#include "maps.h"
#include "packet.h"

/* The pods' cgroup root. What is below it is none of the node's, whatever namespace it is in (hostNetwork). */
struct {
	__uint(type, BPF_MAP_TYPE_CGROUP_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} mesh_root SEC(".maps");

/* The sender is a socket of this very namespace, outside the pods' root, with the packet's own addresses and ports:
 * what was translated on its way differs in them, what was forwarded has no socket, or one of another namespace. */
static __always_inline bool probe_is(struct __sk_buff *skb, const struct flow *f)
{
	struct bpf_sock *sk = skb->sk, *have;
	struct bpf_sock_tuple t = {};

	if (!sk || bpf_skb_under_cgroup(skb, &mesh_root, 0) != 0)
		return false;
	/* A lookup is for who receives. */
	if (is_ip4(&f->local)) {
		t.ipv4.saddr = f->remote.word[3];
		t.ipv4.sport = f->remote_port;
		t.ipv4.daddr = f->local.word[3];
		t.ipv4.dport = f->local_port;
		have = bpf_skc_lookup_tcp(skb, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		for (int i = 0; i < 4; i++) {
			t.ipv6.saddr[i] = f->remote.word[i];
			t.ipv6.daddr[i] = f->local.word[i];
		}
		t.ipv6.sport = f->remote_port;
		t.ipv6.dport = f->local_port;
		have = bpf_skc_lookup_tcp(skb, &t, sizeof(t.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!have)
		return false;
	bool own = have == sk;

	bpf_sk_release(have);
	return own;
}

static __always_inline void probe(struct __sk_buff *skb)
{
	struct flow f = {};
	struct packet_place p = {};

	if (packet_goes_on(skb) || packet_read(skb, &p, &f) != PACKET_SYN)
		return;
	__u64 *netns = bpf_map_lookup_elem(&mesh_pods, &f.remote);

	if (!netns)
		return;
	f.netns = *netns;
	__u64 *have = bpf_map_lookup_elem(&mesh_dials, &f);

	if (have && !*have)
		return; /* known otherwise */
	if (!p.wrapped && probe_is(skb, &f)) {
		__u64 until = bpf_ktime_get_ns() + DIAL_TIME;

		bpf_map_update_elem(&mesh_dials, &f, &until, BPF_ANY);
	} else if (have) {
		bpf_map_delete_elem(&mesh_dials, &f); /* a stranger has a probe's addresses and ports now */
	}
}
