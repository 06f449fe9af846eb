/* Drops: counted by reason for metrics, and told to the agent, which names the pod. However many there are, a pod's
 * drops for one reason are told once in a while, with their number. */
#pragma once

#include "maps.h"

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASON_COUNT);
	__type(key, enum reason);
	__type(value, __u64);
} mesh_drops SEC(".maps");

struct drop_key {
	__u64 netns;
	enum reason reason;
	__u32 reserved;
};

struct drop_sum {
	__u64 told; /* when */
	__u64 untold;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct drop_key);
	__type(value, struct drop_sum);
} mesh_drop_sums SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} mesh_drop_events SEC(".maps");

struct drop_event *const volatile drop_event_type __attribute__((unused)) = 0; /* for the Go side */

#define DROPS_PAUSE 1000000000ULL

/* What is not known of the flow is zero. */
static __always_inline void drop(enum reason reason, const struct flow *f)
{
	__u64 *n = bpf_map_lookup_elem(&mesh_drops, &reason);

	if (n)
		(*n)++;
	struct drop_key key = {.netns = f->netns, .reason = reason};
	struct drop_sum *sum = bpf_map_lookup_elem(&mesh_drop_sums, &key);

	if (!sum) {
		struct drop_sum none = {};

		bpf_map_update_elem(&mesh_drop_sums, &key, &none, BPF_NOEXIST);
		sum = bpf_map_lookup_elem(&mesh_drop_sums, &key);
		if (!sum)
			return;
	}
	__sync_fetch_and_add(&sum->untold, 1);
	__u64 now = bpf_ktime_get_ns(), told = sum->told;

	if ((told && now - told < DROPS_PAUSE) || __sync_val_compare_and_swap(&sum->told, told, now) != told)
		return;
	struct drop_event *e = bpf_ringbuf_reserve(&mesh_drop_events, sizeof(*e), 0);

	if (!e)
		return; /* the sum goes on */
	e->flow = *f;
	e->count = __sync_lock_test_and_set(&sum->untold, 0);
	e->reason = reason;
	e->reserved = 0;
	bpf_ringbuf_submit(e, 0);
}
