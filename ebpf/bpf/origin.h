/* Who opened a captured connection: what pod_connect sees of the task that calls connect(2), which an io_uring worker
 * does in its process's name, is handed over with the destination. The proxy asks for it by getsockopt(SO_ORIGIN). */
#pragma once

#include "maps.h"

static __always_inline struct origin origin_of_current(void)
{
	struct origin o = {.cgroup = bpf_get_current_cgroup_id(), .pid = bpf_get_current_pid_tgid() >> 32};

	bpf_get_current_comm(o.comm, sizeof(o.comm));
	return o;
}

/* The proxy's answer; a socket that no hook handed over is asked in vain (ENOPROTOOPT), as one without hooks is. */
static __always_inline void origin_tell(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct handover *h = sk ? bpf_sk_storage_get(&mesh_original, sk, 0, 0) : NULL;
	struct origin *to = ctx->optval;

	if (!h || (void *)(to + 1) > ctx->optval_end)
		return;
	*to = h->origin;
	ctx->optlen = sizeof(*to);
	barrier(); /* see proxy_getsockopt */
	ctx->retval = 0;
}
