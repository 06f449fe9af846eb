//go:build ignore

/* Programs at the pods' cgroup root (pod_*), at the proxy's cgroup (proxy_*) and where pods' cables begin (node_*),
 * one set per node.
 *
 *	app: connect ── pod_connect ──▶ alias:15001, the destination kept with the socket
 *	                           └──▶ mesh_handover[alias] ── proxy_sockops ──▶ kept with the accepted socket
 *	proxy: getsockopt(SO_ORIGINAL_DST) ── proxy_getsockopt ──▶ the destination
 *
 * Whatever cannot be done is refused: no path leads from an enrolled pod to an unrewritten connect.
 *
 * The programs at the pods' root run for every pod, in the mesh or not: what is not enrolled leaves at the first map
 * lookup, and there is no sockops program, which the kernel would call six times in the life of each connection. */
#include "maps.h"
#include <bpf/bpf_core_read.h>

#define PASS 1
#define REFUSE 0

#define SOCK_STREAM 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_MPTCP 262
#define SOL_SOCKET 1
#define SOL_IP 0
#define SOL_IPV6 41
#define SOL_TCP 6
#define TCP_SYNCNT 7
#define SO_MARK 36
#define SO_BINDTODEVICE 25
#define SO_ORIGINAL_DST 80
#define TCP_ESTABLISHED 1
#define TCP_FIN_WAIT2 5
#define TCP_CLOSE 7
#define TCP_CLOSE_WAIT 8
#define TCP_LAST_ACK 9
#define TCP_CLOSING 11
#define ENETUNREACH 101

struct sockaddr_in {
	__u16 sin_family;
	__be16 sin_port;
	__be32 sin_addr;
	__u8 zero[8];
};

struct sockaddr_in6 {
	__u16 sin6_family;
	__be16 sin6_port;
	__be32 sin6_flowinfo;
	__be32 sin6_addr[4];
	__u32 sin6_scope_id;
};

static __always_inline struct address user_address(struct bpf_sock_addr *ctx, bool v6)
{
	if (!v6)
		return from_ip4(ctx->user_ip4);
	return (struct address){{ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2], ctx->user_ip6[3]}};
}

static __always_inline void set_user_address(struct bpf_sock_addr *ctx, bool v6, const struct address *a)
{
	if (!v6) {
		ctx->user_ip4 = a->word[3];
		return;
	}
	ctx->user_ip6[0] = a->word[0];
	ctx->user_ip6[1] = a->word[1];
	ctx->user_ip6[2] = a->word[2];
	ctx->user_ip6[3] = a->word[3];
}

static __always_inline __be16 user_port(struct bpf_sock_addr *ctx)
{
	return (__be16)ctx->user_port;
}

#include "drops.h"
#include "lease.h"
#include "origin.h"
#include "probe.h"

static __always_inline __u32 mix(__u32 h)
{
	/* A finalizer in the manner of MurmurHash3: spreads, and is no secret. */
	h ^= h >> 16;
	h *= 0x85ebca6b;
	h ^= h >> 13;
	h *= 0xc2b2ae35;
	return h ^ h >> 16;
}

static __always_inline struct address alias_of(bool ip4, __u32 h)
{
	if (ip4) {
		h = ALIAS4_NET | (h & ~ALIAS4_MASK);
		return from_ip4(bpf_htonl(h));
	}
	return (struct address){{bpf_htonl(ALIAS6_0), bpf_htonl(ALIAS6_1), bpf_htonl(ALIAS6_2), bpf_htonl(h | 1)}};
}

/* A neighbour's IPv6 address is known by its interface too, which an alias does not tell. */
static __always_inline bool is_link_local(const struct address *a)
{
	return (a->word[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* DNS over UDP: each server that a pod asks has an alias of its own there, so that each answer seems to come
 * from the server that was asked. All pods share the map, so one of them has ALIAS_SERVERS aliases of a family at
 * most: who asks more servers is given what nobody used for ALIAS_IDLE, longer than a resolver waits for an answer,
 * or is refused. It cannot have the aliases of others evicted. */
#define ALIAS_TRIES 8
#define ALIAS_SERVERS 2048
#define ALIAS_IDLE 30000000000ULL
#define ALIAS_TOUCH 1000000000ULL /* spares most uses the write */

static __always_inline void dns_used(struct server *s, __u64 now)
{
	if (s->used + ALIAS_TOUCH < now)
		s->used = now;
}

static __always_inline bool dns_alias(__u64 netns, const struct address *server, struct address *alias)
{
	struct server fresh = {.addr = *server, .used = bpf_ktime_get_ns()};

	for (__u32 i = 0; i < ALIAS_TRIES; i++) {
		__u32 h = mix(server->word[0] ^
			      mix(server->word[1] ^ mix(server->word[2] ^ mix(server->word[3] ^ mix(i)))));
		struct alias key = {.netns = netns, .addr = alias_of(is_ip4(server), h % ALIAS_SERVERS)};
		struct server *have = bpf_map_lookup_elem(&mesh_aliases, &key);

		if (!have) {
			if (bpf_map_update_elem(&mesh_aliases, &key, &fresh, BPF_NOEXIST))
				continue;
		} else {
			__u64 used = have->used;
			bool idle = used + ALIAS_IDLE < fresh.used, is = same(&have->addr, server);

			/* Of those who want an idle one at the same time one gets it, its own server's too. */
			if (idle ? __sync_val_compare_and_swap(&have->used, used, fresh.used) != used : !is)
				continue;
			if (!is && bpf_map_update_elem(&mesh_aliases, &key, &fresh, BPF_ANY))
				continue;
			dns_used(have, fresh.used);
		}
		*alias = key.addr;
		return true;
	}
	drop(REASON_ALIAS, &(struct flow){.netns = netns, .remote = *server, .remote_port = bpf_htons(PORT_DNS_SERVER)});
	return false;
}

/* A captured connection has an alias that no other one on its way to the proxy has: the proxy's side finds the
 * destination by it. (The source port would do, but is chosen after all hooks but sockops.) */
static __always_inline bool hand_over(__u64 netns, const struct handover *made, struct address *alias)
{
	for (__u32 i = 0; i < ALIAS_TRIES; i++) {
		struct alias key = {.netns = netns, .addr = alias_of(is_ip4(&made->wanted.addr), bpf_get_prandom_u32())};

		if (bpf_map_update_elem(&mesh_handover, &key, made, BPF_NOEXIST) == 0) {
			*alias = key.addr;
			return true;
		}
	}
	return false;
}

static __always_inline void refuse(enum reason reason, __u64 netns, const struct destination *wanted)
{
	struct flow f = {.netns = netns, .remote = wanted->addr, .remote_port = wanted->port};

	drop(reason, &f);
}

/* The pod's own address as source: getsockname(2) stays true, and the proxy sees who it is. A socket that has a
 * port already cannot be bound again; what it would tell is put right in getsockname. */
static __always_inline bool bind_source(struct bpf_sock_addr *ctx, bool v6, struct bpf_sock *sk, __u64 netns,
					const struct enrolment *e, struct destination *wanted)
{
	bool ip4 = is_ip4(&wanted->addr);

	if (v6) {
		__be32 a0 = sk->src_ip6[0], a1 = sk->src_ip6[1], a2 = sk->src_ip6[2], a3 = sk->src_ip6[3];

		if (a0 || a1 || (a2 && a2 != MAPPED) || a3)
			return true;
	} else if (sk->src_ip4) {
		return true;
	}
	const struct address *own = ip4 ? &e->v4 : &e->v6;

	if (is_zero(own)) {
		/* What a pod without that family is told without a mesh, and what makes apps try the other one.
		 * Linux 5.18; EPERM before. */
		if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_set_retval))
			bpf_set_retval(-ENETUNREACH);
		refuse(REASON_FAMILY, netns, wanted);
		return false;
	}
	if (sk->src_port) {
		wanted->flags |= DESTINATION_HIDES_LOCAL;
		return true;
	}
	int err;
	if (v6) {
		struct sockaddr_in6 sa = {
			.sin6_family = AF_INET6,
			.sin6_addr = {own->word[0], own->word[1], own->word[2], own->word[3]},
		};
		err = bpf_bind(ctx, (void *)&sa, sizeof(sa));
	} else {
		struct sockaddr_in sa = {.sin_family = AF_INET, .sin_addr = own->word[3]};

		err = bpf_bind(ctx, (void *)&sa, sizeof(sa));
	}
	if (err)
		refuse(REASON_BIND, netns, wanted);
	return !err;
}

static __always_inline bool keep(void *sk, struct capture *capture)
{
	struct capture *kept = bpf_sk_storage_get(&mesh_wanted, sk, capture, BPF_SK_STORAGE_GET_F_CREATE);

	if (kept)
		*kept = *capture;
	return kept;
}

static __always_inline int connect(struct bpf_sock_addr *ctx, bool v6)
{
	__u32 protocol = ctx->protocol;
	bool tcp = ctx->type == SOCK_STREAM && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP);

	if (!tcp && protocol != IPPROTO_UDP)
		return PASS;
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct enrolment *e = bpf_map_lookup_elem(&mesh_enrolled, &netns);

	if (!e)
		return PASS;
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return REFUSE;
	if (bpf_sk_storage_get(&mesh_own, sk, 0, 0))
		return PASS;
	struct address dst = user_address(ctx, v6);
	struct capture capture = {.made = {.wanted = {.addr = dst, .port = user_port(ctx)}}};
	struct destination *wanted = &capture.made.wanted;
	bool dns = (e->flags & ENROL_DNS) && wanted->port == bpf_htons(PORT_DNS_SERVER);

	if (tcp && is_alias(&dst) && (wanted->port == bpf_htons(PORT_OUTBOUND) || wanted->port == bpf_htons(PORT_DNS))) {
		refuse(REASON_SQUAT, netns, wanted); /* would get what another connection was handed */
		return REFUSE;
	}
	if ((e->flags & ENROL_HOLD) && tcp && !is_loopback(&dst)) {
		refuse(REASON_HOLD, netns, wanted);
		return REFUSE;
	}
	/* What an earlier connect of the socket left need not be deleted: it counts while the peer is an alias. */
	if (is_loopback(&dst) || same(&dst, &e->v4) || same(&dst, &e->v6) ||
	    (!dns && (!tcp || !(e->flags & ENROL_OUTBOUND))) ||
	    (!tcp && is_link_local(&dst)) || (tcp && excluded(e->outside, bpf_ntohs(wanted->port))))
		return PASS;
	struct address alias;

	capture.since = bpf_ktime_get_ns();
	if (!tcp) {
		if (!dns_alias(netns, &dst, &alias))
			return REFUSE;
		/* Resolvers choose between addresses by the source that a socket gets on its way there (RFC 6724), and
		 * some connect to port 53 to see it. */
		wanted->flags |= DESTINATION_HIDES_LOCAL;
	} else {
		/* Which interface the app wants is lost: nothing but an unbound socket speaks to its own pod, since
		 * packets over lo count as received on the interface that owns the address. */
		char none[] = "";
		bool direct = !dns && (e->flags & ENROL_ACCELERATE) && lease_plain(sk, v6, is_ip4(&dst) ? &e->v4 : &e->v6);

		if (sk->bound_dev_if && bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, none, sizeof(none))) {
			refuse(REASON_BIND, netns, wanted);
			return REFUSE;
		}
		if (!bind_source(ctx, v6, sk, netns, e, wanted))
			return REFUSE;
		struct leased lease = {};

		if (direct && lease_take(ctx, sk, netns, wanted, &lease)) {
			set_user_address(ctx, v6, &lease.addr);
			ctx->user_port = lease.port;
			return PASS;
		}
		capture.made.origin = origin_of_current();
		if (!hand_over(netns, &capture.made, &alias)) {
			refuse(REASON_ALIAS, netns, wanted);
			return REFUSE;
		}
		/* This hook sees the first subflow of an MPTCP socket, getpeername the socket. Linux 5.19; older
		 * kernels let an MPTCP app see the alias. */
		if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_skc_to_mptcp_sock)) {
			struct mptcp_sock *whole = bpf_skc_to_mptcp_sock(sk);

			if (whole)
				keep(whole, &capture);
		}
	}
	if (!keep(sk, &capture)) {
		refuse(REASON_STORAGE, netns, wanted);
		return REFUSE;
	}
	set_user_address(ctx, v6, &alias);
	ctx->user_port = dns ? bpf_htons(PORT_DNS) : bpf_htons(PORT_OUTBOUND);
	return PASS;
}

SEC("cgroup/connect4")
int pod_connect4(struct bpf_sock_addr *ctx)
{
	return connect(ctx, false);
}

SEC("cgroup/connect6")
int pod_connect6(struct bpf_sock_addr *ctx)
{
	return connect(ctx, true);
}

static __always_inline int sendmsg(struct bpf_sock_addr *ctx, bool v6)
{
	if (user_port(ctx) != bpf_htons(PORT_DNS_SERVER))
		return PASS;
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct enrolment *e = bpf_map_lookup_elem(&mesh_enrolled, &netns);

	if (!e)
		return PASS;
	struct bpf_sock *sk = ctx->sk;

	if (!(e->flags & ENROL_DNS) || !sk || bpf_sk_storage_get(&mesh_own, sk, 0, 0))
		return PASS;
	struct address dst = user_address(ctx, v6), alias;

	if (is_loopback(&dst) || is_link_local(&dst) || same(&dst, &e->v4) || same(&dst, &e->v6))
		return PASS;
	if (!dns_alias(netns, &dst, &alias))
		return REFUSE;
	set_user_address(ctx, v6, &alias);
	ctx->user_port = bpf_htons(PORT_DNS);
	return PASS;
}

SEC("cgroup/sendmsg4")
int pod_sendmsg4(struct bpf_sock_addr *ctx)
{
	return sendmsg(ctx, false);
}

SEC("cgroup/sendmsg6")
int pod_sendmsg6(struct bpf_sock_addr *ctx)
{
	return sendmsg(ctx, true);
}

static __always_inline int recvmsg(struct bpf_sock_addr *ctx, bool v6)
{
	if (user_port(ctx) != bpf_htons(PORT_DNS))
		return PASS;

	struct alias key = {.addr = user_address(ctx, v6)};

	if (!is_alias(&key.addr))
		return PASS;
	key.netns = bpf_get_netns_cookie(ctx);
	struct server *server = bpf_map_lookup_elem(&mesh_aliases, &key);

	if (server) {
		dns_used(server, bpf_ktime_get_ns());
		set_user_address(ctx, v6, &server->addr);
		ctx->user_port = bpf_htons(PORT_DNS_SERVER);
	}
	return PASS;
}

SEC("cgroup/recvmsg4")
int pod_recvmsg4(struct bpf_sock_addr *ctx)
{
	return recvmsg(ctx, false);
}

SEC("cgroup/recvmsg6")
int pod_recvmsg6(struct bpf_sock_addr *ctx)
{
	return recvmsg(ctx, true);
}

static __always_inline int getpeername(struct bpf_sock_addr *ctx, bool v6)
{
	if (user_port(ctx) != bpf_htons(PORT_OUTBOUND) && user_port(ctx) != bpf_htons(PORT_DNS))
		return PASS;
	struct address peer = user_address(ctx, v6);
	struct bpf_sock *sk = ctx->sk;

	if (!is_alias(&peer) || !sk)
		return PASS;
	struct capture *c = bpf_sk_storage_get(&mesh_wanted, sk, 0, 0);

	if (c) {
		set_user_address(ctx, v6, &c->made.wanted.addr);
		ctx->user_port = c->made.wanted.port;
	}
	return PASS;
}

SEC("cgroup/getpeername4")
int pod_getpeername4(struct bpf_sock_addr *ctx)
{
	return getpeername(ctx, false);
}

SEC("cgroup/getpeername6")
int pod_getpeername6(struct bpf_sock_addr *ctx)
{
	return getpeername(ctx, true);
}

static __always_inline int getsockname(struct bpf_sock_addr *ctx, bool v6)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk || (sk->dst_port != bpf_htons(PORT_OUTBOUND) && sk->dst_port != bpf_htons(PORT_DNS)))
		return PASS;
	struct address peer = v6 ? (struct address){{sk->dst_ip6[0], sk->dst_ip6[1], sk->dst_ip6[2], sk->dst_ip6[3]}} :
				   from_ip4(sk->dst_ip4);

	if (!is_alias(&peer))
		return PASS;
	struct capture *c = bpf_sk_storage_get(&mesh_wanted, sk, 0, 0);

	if (!c || !(c->made.wanted.flags & DESTINATION_HIDES_LOCAL))
		return PASS;
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct enrolment *e = bpf_map_lookup_elem(&mesh_enrolled, &netns);

	if (e)
		set_user_address(ctx, v6, is_ip4(&c->made.wanted.addr) ? &e->v4 : &e->v6);
	return PASS;
}

SEC("cgroup/getsockname4")
int pod_getsockname4(struct bpf_sock_addr *ctx)
{
	return getsockname(ctx, false);
}

SEC("cgroup/getsockname6")
int pod_getsockname6(struct bpf_sock_addr *ctx)
{
	return getsockname(ctx, true);
}

/* TCP listeners of the proxy are found by sk_lookup whoever sits on their port. UDP has no such lookup here, so
 * the port itself is the proxy's. */
static __always_inline int bind(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	if (user_port(ctx) != bpf_htons(PORT_DNS) || ctx->protocol != IPPROTO_UDP || !sk)
		return PASS;
	__u64 netns = bpf_get_netns_cookie(ctx);

	if (!bpf_map_lookup_elem(&mesh_enrolled, &netns) || bpf_sk_storage_get(&mesh_own, sk, 0, 0))
		return PASS;
	drop(REASON_SQUAT, &(struct flow){.netns = netns, .local_port = bpf_htons(PORT_DNS)});
	return REFUSE;
}

SEC("cgroup/bind4")
int pod_bind4(struct bpf_sock_addr *ctx)
{
	return bind(ctx);
}

SEC("cgroup/bind6")
int pod_bind6(struct bpf_sock_addr *ctx)
{
	return bind(ctx);
}

static __always_inline struct flow flow_of(struct bpf_sock_ops *ctx)
{
	struct flow f = {.netns = bpf_get_netns_cookie(ctx)};

	if (ctx->family == AF_INET6) {
		f.local = READ_IP6(ctx, local_ip6);
		f.remote = READ_IP6(ctx, remote_ip6);
	} else {
		f.local = from_ip4(READ(ctx, local_ip4));
		f.remote = from_ip4(READ(ctx, remote_ip4));
	}
	f.local_port = bpf_htons(ctx->local_port);
	f.remote_port = bpf_htons(bpf_ntohl(ctx->remote_port));
	return f;
}

/* Attached while a pod is accelerated. */
SEC("sockops")
int lease_sockops(struct bpf_sock_ops *ctx)
{
	if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		struct flow f = flow_of(ctx);

		lease_connect(ctx, &f);
	} else if (ctx->op == BPF_SOCK_OPS_STATE_CB) {
		lease_state(ctx);
	}
	return 1;
}

SEC("cgroup/getpeername4")
int lease_getpeername4(struct bpf_sock_addr *ctx)
{
	lease_peer(ctx, false);
	return PASS;
}

SEC("cgroup/getpeername6")
int lease_getpeername6(struct bpf_sock_addr *ctx)
{
	lease_peer(ctx, true);
	return PASS;
}

static __always_inline bool mark_own(struct bpf_sock *sk)
{
	__u32 one = 1;

	return sk && bpf_sk_storage_get(&mesh_own, sk, &one, BPF_SK_STORAGE_GET_F_CREATE);
}

/* The proxy need not know which server an alias stands for: a query that it sends on to the alias goes to that
 * server. */
static __always_inline int upstream(struct bpf_sock_addr *ctx, bool v6, __u64 netns, const struct address *dst)
{
	struct alias key = {.netns = netns, .addr = *dst};
	struct server *server = bpf_map_lookup_elem(&mesh_aliases, &key);

	if (!server) {
		drop(REASON_ALIAS, &(struct flow){.netns = netns, .remote = *dst, .remote_port = user_port(ctx)});
		return REFUSE;
	}
	dns_used(server, bpf_ktime_get_ns());
	set_user_address(ctx, v6, &server->addr);
	return PASS;
}

static __always_inline int proxy_connect(struct bpf_sock_addr *ctx, bool v6)
{
	if (!mark_own(ctx->sk))
		return REFUSE;
	__u64 netns = bpf_get_netns_cookie(ctx);
	struct enrolment *e = bpf_map_lookup_elem(&mesh_enrolled, &netns);

	if (!e)
		return PASS;
	struct address dst = user_address(ctx, v6);

	if (ctx->protocol == IPPROTO_UDP)
		return is_alias(&dst) ? upstream(ctx, v6, netns, &dst) : PASS;
	if (ctx->type == SOCK_STREAM && (same(&dst, &e->v4) || same(&dst, &e->v6))) {
		/* To the app, maybe in the name of a client: tcp_fwmark_accept gives the app's side the mark too,
		 * and marked packets are local, whatever their destination. */
		__u32 mark = MARK_RETURN;

		if (bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)))
			return REFUSE;
	}
	return PASS;
}

static __always_inline int proxy_sendmsg(struct bpf_sock_addr *ctx, bool v6)
{
	struct address dst = user_address(ctx, v6);

	if (!mark_own(ctx->sk))
		return REFUSE;
	/* Only queries: what the proxy answers goes to apps, which have no alias. */
	return is_alias(&dst) ? upstream(ctx, v6, bpf_get_netns_cookie(ctx), &dst) : PASS;
}

SEC("cgroup/connect4")
int proxy_connect4(struct bpf_sock_addr *ctx)
{
	return proxy_connect(ctx, false);
}

SEC("cgroup/connect6")
int proxy_connect6(struct bpf_sock_addr *ctx)
{
	return proxy_connect(ctx, true);
}

SEC("cgroup/sendmsg4")
int proxy_sendmsg4(struct bpf_sock_addr *ctx)
{
	return proxy_sendmsg(ctx, false);
}

SEC("cgroup/sendmsg6")
int proxy_sendmsg6(struct bpf_sock_addr *ctx)
{
	return proxy_sendmsg(ctx, true);
}

SEC("cgroup/bind4")
int proxy_bind4(struct bpf_sock_addr *ctx)
{
	return mark_own(ctx->sk) ? PASS : REFUSE;
}

SEC("cgroup/bind6")
int proxy_bind6(struct bpf_sock_addr *ctx)
{
	return mark_own(ctx->sk) ? PASS : REFUSE;
}

static __always_inline void listening(struct bpf_sock_ops *ctx)
{
	struct listener key = {.netns = bpf_get_netns_cookie(ctx), .family = ctx->family, .port = ctx->local_port};

	if (key.port == PORT_OUTBOUND || key.port == PORT_INBOUND || key.port == PORT_HBONE || key.port == PORT_DNS)
		bpf_sock_hash_update(ctx, &mesh_listeners, &key, BPF_ANY);
}

static __always_inline void accepted(struct bpf_sock_ops *ctx)
{
	if (ctx->local_port != PORT_OUTBOUND && ctx->local_port != PORT_DNS)
		return;
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return;
	struct alias key = {.netns = bpf_get_netns_cookie(ctx)};

	if (ctx->family == AF_INET6)
		key.addr = READ_IP6(ctx, local_ip6);
	else
		key.addr = from_ip4(READ(ctx, local_ip4));
	struct handover *have = bpf_map_lookup_elem(&mesh_handover, &key);

	if (!have)
		return; /* SO_ORIGINAL_DST fails, and the proxy closes */
	struct handover h = *have;

	bpf_sk_storage_get(&mesh_original, sk, &h, BPF_SK_STORAGE_GET_F_CREATE);
	bpf_map_delete_elem(&mesh_handover, &key);
}

/* A dial out is known from before its SYN until it is established or given up: afterwards its packets belong to a
 * socket, and the entry would let a stranger with the same addresses and ports out. One to the app is known for
 * a moment longer: where SYNs are answered with cookies (tcp_syncookies) the ACK looks for a listener too. */
static __always_inline void dialling(struct bpf_sock_ops *ctx)
{
	struct flow f = flow_of(ctx);
	__u64 forever = 0;

	if (!bpf_map_lookup_elem(&mesh_enrolled, &f.netns))
		return;
	if (bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG))
		return;
	bpf_map_update_elem(&mesh_dials, &f, &forever, BPF_ANY);
}

static __always_inline void dialled(struct bpf_sock_ops *ctx)
{
	if (ctx->args[1] != TCP_ESTABLISHED && ctx->args[1] != TCP_CLOSE)
		return;
	struct flow f = flow_of(ctx);
	struct enrolment *e = bpf_map_lookup_elem(&mesh_enrolled, &f.netns);

	if (ctx->args[1] == TCP_ESTABLISHED && e && (same(&f.remote, &e->v4) || same(&f.remote, &e->v6))) {
		__u64 until = bpf_ktime_get_ns() + DIAL_TIME;

		bpf_map_update_elem(&mesh_dials, &f, &until, BPF_EXIST);
		return;
	}
	bpf_map_delete_elem(&mesh_dials, &f);
}

SEC("sockops")
int proxy_sockops(struct bpf_sock_ops *ctx)
{
	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		listening(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		accepted(ctx);
		break;
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		dialling(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		dialled(ctx);
		break;
	}
	return 1;
}

/* At the node's end of each enrolled pod's cable, for what goes to the pod. */
SEC("tcx/egress")
int node_probe(struct __sk_buff *skb)
{
	probe(skb);
	return TC_PASS;
}

SEC("cgroup/getsockopt")
int proxy_getsockopt(struct bpf_sockopt *ctx)
{
	bool ip4 = ctx->level == SOL_IP;

	if (!ip4 && ctx->level != SOL_IPV6)
		return PASS;
	if (ctx->optname == SO_ORIGIN)
		origin_tell(ctx);
	if (ctx->optname != SO_ORIGINAL_DST)
		return PASS;
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return PASS;
	struct handover *h = bpf_sk_storage_get(&mesh_original, sk, 0, 0);

	if (!h || is_ip4(&h->wanted.addr) != ip4)
		return PASS;
	struct destination *d = &h->wanted;
	void *val = ctx->optval, *end = ctx->optval_end;
	if (ip4) {
		struct sockaddr_in *sa = val;

		if ((void *)(sa + 1) > end)
			return PASS;
		*sa = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = d->port, .sin_addr = d->addr.word[3]};
		ctx->optlen = sizeof(*sa);
	} else {
		struct sockaddr_in6 *sa = val;

		if ((void *)(sa + 1) > end)
			return PASS;
		*sa = (struct sockaddr_in6){
			.sin6_family = AF_INET6,
			.sin6_port = d->port,
			.sin6_addr = {d->addr.word[0], d->addr.word[1], d->addr.word[2], d->addr.word[3]},
		};
		ctx->optlen = sizeof(*sa);
	}
	/* The two results stay stores of their own: merged into one of eight bytes the verifier refuses them. */
	barrier();
	ctx->retval = 0;
	return PASS;
}

char _license[] SEC("license") = "Apache-2.0";
