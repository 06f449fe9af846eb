/* The contract between the programs and package redirect: ports, marks, keys and values. Go's side of it is
 * generated from this file. Whoever changes the size or the meaning of anything here raises MESH_LAYOUT. */
#pragma once

#include <linux/types.h>
#include <stdbool.h>

#define MESH_LAYOUT 1

enum {
	PORT_DNS_SERVER = 53,
	PORT_OUTBOUND = 15001,
	PORT_INBOUND = 15006,
	PORT_HBONE = 15008,
	PORT_DNS = 15053,
};

enum {
	/* On the proxy's dials to the app, so that replies to an address that is not the pod's come back to it. */
	MARK_RETURN = 0x111,
};

/* An address of either family; IPv4 is written as IPv6 does it (RFC 4291 section 2.5.5.2), so that a socket of
 * either family that speaks IPv4 yields the same key. */
struct address {
	__be32 word[4];
};

struct destination {
	struct address addr;
	__be16 port;
	__u16 flags;
};

/* The socket was bound to a port and no address: getsockname(2) would tell the loopback address. */
#define DESTINATION_HIDES_LOCAL 1

/* Who opened a connection. The name is whatever the process calls its thread: bytes of an attacker's choice. */
struct origin {
	__u64 cgroup; /* id: the directory's inode number */
	__u32 pid;    /* of the process, in the node's first PID namespace */
	__u32 reserved;
	__u8 comm[16];
};

/* What the app's side hands over to the proxy's. */
struct handover {
	struct origin origin;
	struct destination wanted;
	__u32 reserved;
};

/* What is kept with the app's socket. */
struct capture {
	struct handover made;
	__u64 since; /* by the clock of bpf_ktime_get_ns */
};

enum {
	/* getsockopt(2) at SOL_IP or SOL_IPV6 on an accepted socket yields struct origin. Linux has no options there. */
	SO_ORIGIN = 0x4d657368,
};

enum enrolment_flag {
	ENROL_OUTBOUND = 1,
	ENROL_INBOUND = 2,
	ENROL_DNS = 4,
	ENROL_ACCELERATE = 8,
	ENROL_HOLD = 16, /* what else it says was lost, and is being written again: nobody but the proxy connects */
};

/* Ports, both ends included, in host order; a zero last ends a list. */
struct port_range {
	__u16 first, last;
};

#define PORT_RANGES 16

struct enrolment {
	struct address v4, v6; /* the pod's own; zero when it has none */
	enum enrolment_flag flags;
	__u32 reserved;
	/* Connections to these are none of the mesh's: others' and the pod's own ones. */
	struct port_range outside[PORT_RANGES], inside[PORT_RANGES];
};

/* One connection, seen from the side that opened it. */
struct flow {
	__u64 netns; /* cookie */
	struct address local, remote;
	__be16 local_port, remote_port;
	__u32 reserved;
};

struct listener {
	__u64 netns;
	__u32 family;
	__u32 port;
};

/* A loopback address that stands for a destination in one pod: for a server that is asked for names, or for the
 * destination of one connection. */
struct alias {
	__u64 netns;
	struct address addr;
};

/* Whom an alias of DNS stands for. */
struct server {
	struct address addr;
	__u64 used; /* when last, by the clock of bpf_ktime_get_ns */
};

struct settings {
	__u32 layout;
	__u32 hold; /* enrolments are being written again: not for programs, but for an agent that follows */
};

enum reason {
	REASON_HOLD,	      /* enrolments are being rebuilt */
	REASON_BIND,	      /* the socket could not be given the pod's address */
	REASON_STORAGE,	      /* no memory for the destination */
	REASON_ALIAS,	      /* no loopback address left for a DNS server */
	REASON_NO_LISTENER,   /* the proxy does not listen */
	REASON_LEAK,	      /* a SYN that no hook has seen */
	REASON_MALFORMED,     /* a packet whose headers do not tell */
	REASON_FAMILY,	      /* the pod has no address of that family */
	REASON_SQUAT,	      /* a bind to the proxy's DNS port, or a connect to its port at an alias, or from elsewhere to an alias */
	REASON_COUNT,
};

/* Drops of one pod for one reason since the last such event, and the flow of the last of them: seen from the side
 * that opened it, with zeros where the hook is too early to know. */
struct drop_event {
	struct flow flow;
	__u64 count;
	enum reason reason;
	__u32 reserved;
};

/* Where a pod wants to go. */
struct lease_key {
	__u64 netns;
	struct address addr;
	__be16 port;
	__u16 reserved[3];
};

#define LEASE_TARGETS 4

/* A pod of the same node, and the share of connections that goes there: random 32 bits up to upto, after the shares
 * of those before it. What is nobody's share goes to the proxy. */
struct lease_target {
	struct address addr;
	__be16 port;
	__u16 reserved;
	__u32 upto;
	__u64 id; /* of the pair, never used again; 0: none */
	__u64 netns;
};

struct lease {
	__u64 until; /* CLOCK_MONOTONIC, ns */
	struct lease_target target[LEASE_TARGETS];
};

/* What a socket connects under. */
struct leased {
	struct lease_key key;
	__u64 id, netns;
	struct address addr;
	__be16 port;
	__u16 reserved[3];
};

/* A connection without the proxy. */
struct direct {
	struct lease_key key;
	struct flow flow; /* all zeros before the SYN */
	__u64 lease, to, since, fence;
	__u64 at_fin_wait2; /* bytes received until then */
	__u32 open, fin;
};

enum direct_kind {
	DIRECT_OPENED = 1,
	DIRECT_CLOSED,
	DIRECT_VOID, /* the lease ended while it connected */
};

struct direct_event {
	__u64 cookie, at;
	struct direct direct;
	__u64 sent, received;
	__u32 rtt; /* us */
	__u32 retransmits;
	enum direct_kind kind;
	__u32 reserved;
};
