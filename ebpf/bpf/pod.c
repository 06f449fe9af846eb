//go:build ignore

/* Programs of one pod: one instance per network namespace, whose cookie is a constant of the instance, since
 * neither of these hooks can ask for it. */
#include "maps.h"
#include "drops.h"

#define TC_PASS (-1) /* TCX_NEXT: the next program decides */
#define TC_DROP 2

#define IPPROTO_TCP 6
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd

const volatile __u64 pod_netns = 0;

static __always_inline int steer(struct bpf_sk_lookup *ctx, __u32 port, const struct flow *f)
{
	struct listener key = {.netns = pod_netns, .family = ctx->family, .port = port};
	struct bpf_sock *sk = bpf_map_lookup_elem(&mesh_listeners, &key);

	if (!sk && ctx->family == AF_INET) {
		key.family = AF_INET6; /* a listener for both */
		sk = bpf_map_lookup_elem(&mesh_listeners, &key);
	}
	if (!sk) {
		drop(REASON_NO_LISTENER, f);
		return SK_DROP;
	}
	/* The listener that came last, not the group that it may share its port with. */
	long err = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT | BPF_SK_LOOKUP_F_REPLACE);

	bpf_sk_release(sk);
	return err ? SK_DROP : SK_PASS;
}

/* Steers connections to the proxy's listeners, whoever else sits on their ports, and keeps the address that the
 * client dialled. */
SEC("sk_lookup")
int pod_lookup(struct bpf_sk_lookup *ctx)
{
	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	__u64 netns = pod_netns;
	struct enrolment *e = bpf_map_lookup_elem(&mesh_enrolled, &netns);

	if (!e)
		return SK_PASS;
	struct flow f = {.netns = netns, .remote_port = bpf_htons(ctx->local_port), .local_port = (__be16)ctx->remote_port};

	/* The flow is seen from the side that opened it. */
	if (ctx->family == AF_INET6) {
		f.local = READ_IP6(ctx, remote_ip6);
		f.remote = READ_IP6(ctx, local_ip6);
	} else {
		f.local = from_ip4(READ(ctx, remote_ip4));
		f.remote = from_ip4(READ(ctx, local_ip4));
	}
	if (is_alias(&f.remote) && (ctx->local_port == PORT_OUTBOUND || ctx->local_port == PORT_DNS))
		return steer(ctx, ctx->local_port, &f);
	if (is_loopback(&f.remote) || same(&f.local, &f.remote))
		return SK_PASS; /* the app with itself */
	if (!(e->flags & ENROL_INBOUND) || excluded(e->inside, ctx->local_port) || bpf_map_lookup_elem(&mesh_dials, &f))
		return SK_PASS;
	return steer(ctx, ctx->local_port == PORT_HBONE ? PORT_HBONE : PORT_INBOUND, &f);
}

struct ports {
	__be16 source, destination;
};

/* The backstop: a SYN that leaves the pod belongs to a connection that the proxy is opening, and whatever else
 * sent it (a raw or packet socket, a stack of the app's own, a race) does not get it out. A gate that sees no
 * sockets (the host's end of the cable) decides as well as one that does. */
static __always_inline int gate(struct __sk_buff *skb)
{
	__u64 netns = pod_netns;
	struct enrolment *e = bpf_map_lookup_elem(&mesh_enrolled, &netns);

	if (!e || !(e->flags & ENROL_OUTBOUND))
		return TC_PASS;
	struct flow f = {.netns = netns};
	__u32 at = 14;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct {
			__u8 version, tos;
			__be16 len, id, fragment;
			__u8 ttl, protocol;
			__be16 sum;
			__be32 source, destination;
		} ip;

		if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)))
			goto malformed;
		if (ip.protocol != IPPROTO_TCP)
			return TC_PASS;
		__u16 offset = bpf_ntohs(ip.fragment) & 0x1fff;
		if (offset == 1)
			goto malformed; /* would overwrite the flags: RFC 3128 */
		if (offset)
			return TC_PASS;
		f.local = from_ip4(ip.source);
		f.remote = from_ip4(ip.destination);
		at += (ip.version & 0xf) * 4;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct {
			__be32 flow;
			__be16 len;
			__u8 next, hops;
			struct address source, destination;
		} ip;

		if (bpf_skb_load_bytes(skb, at, &ip, sizeof(ip)))
			goto malformed;
		f.local = ip.source;
		f.remote = ip.destination;
		at += sizeof(ip);
		for (int i = 0; i < 6 && ip.next != IPPROTO_TCP; i++) {
			struct {
				__u8 next, len;
				__be16 fragment;
			} ext;

			/* Hop-by-hop, routing, fragment, destination options: RFC 8200 section 4. */
			if (ip.next != 0 && ip.next != 43 && ip.next != 44 && ip.next != 60)
				return TC_PASS;
			if (bpf_skb_load_bytes(skb, at, &ext, sizeof(ext)))
				goto malformed;
			if (ip.next == 44 && (bpf_ntohs(ext.fragment) & 0xfff8))
				return TC_PASS;
			at += ip.next == 44 ? 8 : (ext.len + 1) * 8;
			ip.next = ext.next;
		}
		if (ip.next != IPPROTO_TCP)
			goto malformed;
	} else {
		return TC_PASS;
	}
	struct ports p;
	__u8 flags;

	if (bpf_skb_load_bytes(skb, at, &p, sizeof(p)) || bpf_skb_load_bytes(skb, at + 13, &flags, 1))
		goto malformed;
	if ((flags & 0x12) != 0x02) /* SYN without ACK */
		return TC_PASS;
	f.local_port = p.source;
	f.remote_port = p.destination;
	if (excluded(e->outside, bpf_ntohs(p.destination)) || bpf_map_lookup_elem(&mesh_dials, &f))
		return TC_PASS;
	drop(REASON_LEAK, &f);
	return TC_DROP;
malformed:
	drop(REASON_MALFORMED, &f);
	return TC_DROP;
}

SEC("tcx/egress")
int pod_gate(struct __sk_buff *skb)
{
	return gate(skb);
}

/* At the host's end of the cable, which packets also reach that pass no queue (PACKET_QDISC_BYPASS). */
SEC("tcx/ingress")
int host_gate(struct __sk_buff *skb)
{
	return gate(skb);
}

char _license[] SEC("license") = "Apache-2.0";
