//go:build ignore

/* Programs of one pod: one instance per network namespace, whose cookie is a constant of the instance, since
 * neither of these hooks can ask for it. */
#include "maps.h"
#include "drops.h"
#include "packet.h"

#define LOOPBACK_IFINDEX 1 /* lo, in every namespace */

const volatile __u64 pod_netns = 0;

/* Whether this kernel's struct bpf_sk_lookup has ingress_ifindex. Who loads finds out once: a relocation would have
 * the kernel's types read for each pod anew, which took longer than all else that is not the verifier's. */
const volatile bool lookup_tells_interface = false;

/* Whether a packet to an alias is the pod's own. A neighbour in the network can send some too, to IPv6's
 * aliases, and who connected to one that stands for a connection on its way to the proxy would go on in the pod's
 * name. Before Linux 5.17 the interface is not told; there the source has to be the
 * pod's, whose answers reach nobody else. */
static __always_inline bool from_within(struct bpf_sk_lookup *ctx, const struct enrolment *e, const struct flow *f)
{
	if (lookup_tells_interface)
		return READ(ctx, ingress_ifindex) == LOOPBACK_IFINDEX;
	return is_ip4(&f->local) || is_loopback(&f->local) || same(&f->local, &e->v6);
}

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
	if (is_alias(&f.remote) && !from_within(ctx, e, &f)) {
		drop(REASON_SQUAT, &f);
		return SK_DROP;
	}
	if (is_alias(&f.remote) && (ctx->local_port == PORT_OUTBOUND || ctx->local_port == PORT_DNS))
		return steer(ctx, ctx->local_port, &f);
	if (is_loopback(&f.remote) || same(&f.local, &f.remote))
		return SK_PASS; /* the app with itself */
	if (!(e->flags & ENROL_INBOUND) || excluded(e->inside, ctx->local_port) || is_dial(&f))
		return SK_PASS;
	return steer(ctx, ctx->local_port == PORT_HBONE ? PORT_HBONE : PORT_INBOUND, &f);
}

/* The backstop: a SYN that leaves the pod belongs to a connection that the proxy is opening, and whatever else
 * sent it (a raw or packet socket, a stack of the app's own, a race) does not get it out. A gate that sees no
 * sockets (the host's end of the cable) decides as well as one that does. */
static __always_inline int gate(struct __sk_buff *skb)
{
	if (packet_goes_on(skb))
		return TC_PASS;
	__u64 netns = pod_netns;
	struct enrolment *e = bpf_map_lookup_elem(&mesh_enrolled, &netns);

	if (!e || !(e->flags & ENROL_OUTBOUND))
		return TC_PASS;
	struct flow f = {.netns = netns};
	struct packet_place p = {};

	switch (packet_read(skb, &p, &f)) {
	case PACKET_SYN:
		break;
	case PACKET_MALFORMED:
		drop(REASON_MALFORMED, &f);
		return TC_DROP;
	default:
		return TC_PASS;
	}
	/* The proxy wraps nothing. */
	if (!p.wrapped && (excluded(e->outside, bpf_ntohs(f.remote_port)) || is_dial(&f)))
		return TC_PASS;
	drop(REASON_LEAK, &f);
	return TC_DROP;
}

/* Where packets leave the pod, and at the node's end of the cable, which packets also reach that pass no queue
 * (PACKET_QDISC_BYPASS). One program for both: the verifier's work on it is most of what an enrolment costs. */
SEC("tcx/egress")
int pod_gate(struct __sk_buff *skb)
{
	return gate(skb);
}

char _license[] SEC("license") = "Apache-2.0";
