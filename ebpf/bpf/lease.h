/* Leases: pairs of pods of one node that the proxy has joined before, and whose next connections may do without it.
 *
 *	app: connect ── lease_take ──▶ the pod's own address:port, over the cable
 *	     TCP_CONNECT ── lease_connect ──▶ the lease again, then mesh_dials[exact 4-tuple] of both pods
 *	     ESTABLISHED, CLOSE ── lease_state ──▶ mesh_direct_events: the agent, and the proxy that accounts
 *
 * Who ends a lease deletes it, and then destroys what mesh_direct has of it. A connection enters mesh_direct before
 * it looks at its lease for the last time: whichever comes first, it sees no lease or is seen.
 *
 * Only the agent writes mesh_leases, and a lease nobody renews ends by the clock. */
#pragma once

#include "maps.h"
#include <bpf/bpf_core_read.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct lease_key);
	__type(value, struct lease);
} mesh_leases SEC(".maps");

/* Which lease a socket connects under. Stale on one that connects again: what is connected to tells. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct leased);
} mesh_leased SEC(".maps");

/* Live connections under leases, also ended ones, by the cookie of the socket that opened them. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct direct);
} mesh_direct SEC(".maps");

/* What the agent does not fetch in time is lost; it compares with mesh_direct. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 19);
} mesh_direct_events SEC(".maps");

struct direct_event *const volatile lease_event_type __attribute__((unused)) = 0; /* for the Go side */

static __always_inline const struct lease_target *lease_choose(const struct lease *l)
{
	__u32 r = bpf_get_prandom_u32();

	for (int i = 0; i < LEASE_TARGETS; i++)
		if (l->target[i].id && r <= l->target[i].upto)
			return &l->target[i];
	return NULL;
}

/* Only a socket that is as the proxy's own would be: what asks for a foreign address, a device or a mark takes the
 * ordinary way, and so does a port without an address, which cannot be given one. */
static __always_inline bool lease_plain(struct bpf_sock *sk, bool v6, const struct address *own)
{
	if (sk->bound_dev_if || sk->mark)
		return false;
	/* Its subflows are more than one connection. */
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_skc_to_mptcp_sock) && bpf_skc_to_mptcp_sock(sk))
		return false;
	if (!v6)
		return sk->src_ip4 ? sk->src_ip4 == own->word[3] : !sk->src_port;
	__be32 a0 = sk->src_ip6[0], a1 = sk->src_ip6[1], a2 = sk->src_ip6[2], a3 = sk->src_ip6[3];

	if (!(a0 | a1 | a3) && (!a2 || a2 == MAPPED))
		return !sk->src_port;
	return a0 == own->word[0] && a1 == own->word[1] && a2 == own->word[2] && a3 == own->word[3];
}

static __always_inline bool lease_opted(__u64 netns)
{
	struct enrolment *e = bpf_map_lookup_elem(&mesh_enrolled, &netns);

	return e && (e->flags & ENROL_ACCELERATE);
}

/* Finds where a connect may go without the proxy, and notes it. The caller has bound the socket to the pod's own
 * address. */
static __always_inline bool lease_take(struct bpf_sock_addr *ctx, struct bpf_sock *sk, __u64 netns,
				       const struct destination *wanted, struct leased *out)
{
	out->key = (struct lease_key){.netns = netns, .addr = wanted->addr, .port = wanted->port};
	struct lease *l = bpf_map_lookup_elem(&mesh_leases, &out->key);
	__u64 now = bpf_ktime_get_ns();

	if (!l || l->until <= now)
		return false;
	const struct lease_target *t = lease_choose(l);

	if (!t || is_ip4(&t->addr) != is_ip4(&wanted->addr) || !lease_opted(t->netns))
		return false;
	out->id = t->id;
	out->netns = t->netns;
	out->addr = t->addr;
	out->port = t->port;

	struct leased *kept = bpf_sk_storage_get(&mesh_leased, sk, out, BPF_SK_STORAGE_GET_F_CREATE);

	if (!kept)
		return false;
	*kept = *out;
	struct direct d = {.key = out->key, .lease = out->id, .to = out->netns, .since = now};
	__u64 cookie = bpf_get_socket_cookie(ctx);

	return bpf_map_update_elem(&mesh_direct, &cookie, &d, BPF_ANY) == 0;
}

/* Whether the lease that a socket connects under is still there. */
static __always_inline bool lease_holds(const struct leased *s, __u64 now)
{
	struct lease_key key = s->key;
	struct lease *l = bpf_map_lookup_elem(&mesh_leases, &key);

	if (!l || l->until <= now || !lease_opted(key.netns) || !lease_opted(s->netns))
		return false;
	for (int i = 0; i < LEASE_TARGETS; i++)
		if (l->target[i].id == s->id)
			return true;
	return false;
}

static __always_inline struct direct_event *lease_event(__u64 cookie, const struct direct *d, enum direct_kind kind)
{
	struct direct_event *e = bpf_ringbuf_reserve(&mesh_direct_events, sizeof(*e), 0);

	if (e)
		*e = (struct direct_event){.cookie = cookie, .kind = kind, .at = bpf_ktime_get_ns(), .direct = *d};
	return e;
}

static __always_inline void lease_tell(__u64 cookie, const struct direct *d, enum direct_kind kind)
{
	struct direct_event *e = lease_event(cookie, d, kind);

	if (e)
		bpf_ringbuf_submit(e, 0);
}

/* What the app moved. The kernel counts SYN and FIN as bytes; that a FIN has come in FIN_WAIT2 nothing tells but
 * that something did. */
static __always_inline void lease_tell_end(struct bpf_sock_ops *ctx, __u64 cookie, const struct direct *d)
{
	__u32 was = ctx->args[0];
	struct direct_event *e = lease_event(cookie, d, DIRECT_CLOSED);

	if (!e)
		return;
	if (d->open) {
		__u64 received = ctx->bytes_received, acked = ctx->bytes_acked;
		bool fin = d->fin || (was == TCP_FIN_WAIT2 && received > d->at_fin_wait2);
		bool fin_acked = was == TCP_FIN_WAIT2 || ((was == TCP_LAST_ACK || was == TCP_CLOSING) && !ctx->packets_out);

		e->received = received - fin;
		e->sent = acked - 1 - fin_acked;
		e->rtt = ctx->srtt_us >> 3;
		e->retransmits = ctx->total_retrans;
	}
	bpf_ringbuf_submit(e, 0);
}

static __always_inline struct flow lease_arriving(const struct flow *f, __u64 netns)
{
	struct flow in = *f;

	in.netns = netns;
	return in;
}

/* A SYN is about to leave. */
static __always_inline void lease_connect(struct bpf_sock_ops *ctx, const struct flow *f)
{
	struct bpf_sock *sk = ctx->sk;
	struct leased *s = sk ? bpf_sk_storage_get(&mesh_leased, sk, 0, 0) : NULL;

	if (!s || f->remote_port != s->port || !same(&f->remote, &s->addr))
		return;
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct direct *d = bpf_map_lookup_elem(&mesh_direct, &cookie);

	if (!d)
		return; /* swept: too long on its way here. Its SYN meets the gate */
	d->flow = *f;
	/* Nothing that follows may be read before d is seen: a fence. */
	__sync_fetch_and_add(&d->fence, 1);

	if (bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG) ||
	    !lease_holds(s, bpf_ktime_get_ns())) {
		/* The gate drops the SYN; the agent has the app told at once, or the kernel does after one more. */
		int once = 1;

		bpf_setsockopt(ctx, SOL_TCP, TCP_SYNCNT, &once, sizeof(once));
		lease_tell(cookie, d, DIRECT_VOID);
		return;
	}
	__u64 forever = 0;
	struct flow in = lease_arriving(f, s->netns);

	bpf_map_update_elem(&mesh_dials, &in, &forever, BPF_ANY);
	bpf_map_update_elem(&mesh_dials, f, &forever, BPF_ANY);
}

/* The app is told whom it asked for. */
static __always_inline void lease_peer(struct bpf_sock_addr *ctx, bool v6)
{
	struct bpf_sock *sk = ctx->sk;
	struct leased *s = sk ? bpf_sk_storage_get(&mesh_leased, sk, 0, 0) : NULL;

	if (!s)
		return;
	struct address peer = user_address(ctx, v6);
	__u64 cookie = bpf_get_socket_cookie(ctx);

	if (user_port(ctx) != s->port || !same(&peer, &s->addr) || !bpf_map_lookup_elem(&mesh_direct, &cookie))
		return;
	set_user_address(ctx, v6, &s->key.addr);
	ctx->user_port = s->key.port;
}

/* The way out ends with the SYN's answer, as that of any dial. The way in lasts: where SYNs are answered with
 * cookies (tcp_syncookies), the ACK looks for a listener too. */
static __always_inline void lease_state(struct bpf_sock_ops *ctx)
{
	__u32 state = ctx->args[1];
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct direct *d = bpf_map_lookup_elem(&mesh_direct, &cookie);

	if (!d)
		return;
	struct flow f = d->flow;

	switch (state) {
	case TCP_ESTABLISHED:
		bpf_map_delete_elem(&mesh_dials, &f);
		d->open = 1;
		lease_tell(cookie, d, DIRECT_OPENED);
		break;
	case TCP_FIN_WAIT2:
		d->at_fin_wait2 = ctx->bytes_received;
		break;
	case TCP_CLOSE_WAIT:
	case TCP_CLOSING:
		d->fin = 1;
		break;
	case TCP_CLOSE:
		bpf_map_delete_elem(&mesh_dials, &f);
		f.netns = d->to;
		bpf_map_delete_elem(&mesh_dials, &f);
		lease_tell_end(ctx, cookie, d);
		bpf_map_delete_elem(&mesh_direct, &cookie);
		break;
	}
}
