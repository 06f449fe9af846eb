/* What a frame says, read from its bytes alone: what a packet socket tells the kernel about them may be false. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "maps.h"

#define IPPROTO_HOPOPTS 0
#define IPPROTO_IPIP 4
#define IPPROTO_TCP 6
#define IPPROTO_IPV6 41
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_DSTOPTS 60

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8

/* More of either is no traffic that anybody misses. */
#define PACKET_TAGS 2
#define PACKET_HEADERS 8

enum packet {
	PACKET_OTHER,	  /* begins no TCP connection */
	PACKET_SYN,	  /* begins one */
	PACKET_MALFORMED, /* might begin one */
};

/* Every packet is read in full. A test compares. */
const volatile bool packet_unhurried = false;

struct packet_place {
	__u32 at;
	__u8 next;    /* the protocol of what is there */
	bool wrapped; /* in another packet, or behind a VLAN tag */
	bool cut;     /* the first fragment of more */
	__u8 reserved;
	__u32 end; /* of the packet, as its IP header says */
};

/* Whether the packet has n more bytes. What a frame has behind a packet's end, others do not read: behind the end of
 * a fragment the next one is what counts, and such bytes would speak in its place. A whole packet that ends too early
 * is read by nobody. */
static __always_inline bool packet_has(const struct packet_place *p, __u32 n)
{
	return !p->cut || p->at + n <= p->end;
}

/* Within a fragment, nothing reaches further than that does. */
static __always_inline void packet_ends(struct packet_place *p, __u32 end)
{
	if (!p->cut || end < p->end)
		p->end = end;
}

/* Says of nearly all packets, without a call, what packet_read would: that they are PACKET_OTHER. Of what is not
 * read here (wrapped, in fragments, with options or extensions, in pages) it says nothing. TCP hands over its
 * headers in one piece, of whatever size the packet is. */
static __always_inline bool packet_goes_on(struct __sk_buff *skb)
{
	const __u8 *b = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (packet_unhurried || b + 14 + 20 + 14 > end)
		return false;
	if (*(__be16 *)(b + 12) == bpf_htons(ETH_P_IP))
		return b[14] == 0x45 && !(*(__be16 *)(b + 20) & bpf_htons(0x3fff)) && b[23] == IPPROTO_TCP &&
		       (b[47] & 0x12) != 0x02;
	if (b + 14 + 40 + 14 > end)
		return false;
	return *(__be16 *)(b + 12) == bpf_htons(ETH_P_IPV6) && b[20] == IPPROTO_TCP && (b[67] & 0x12) != 0x02;
}

/* Ethernet and its tags. A tag that says nothing but a priority is removed by whoever receives the frame, one
 * after the other. */
static __always_inline enum packet packet_ether(struct __sk_buff *skb, struct packet_place *p)
{
	__be16 type;

	p->at = 12;
	for (int i = 0; i <= PACKET_TAGS; i++) {
		if (bpf_skb_load_bytes(skb, p->at, &type, sizeof(type)))
			return PACKET_OTHER;
		p->at += sizeof(type);
		if (type == bpf_htons(ETH_P_IP)) {
			p->next = IPPROTO_IPIP;
			return PACKET_SYN;
		}
		if (type == bpf_htons(ETH_P_IPV6)) {
			p->next = IPPROTO_IPV6;
			return PACKET_SYN;
		}
		if (type != bpf_htons(ETH_P_8021Q) && type != bpf_htons(ETH_P_8021AD))
			return PACKET_OTHER;
		p->at += 2;
		p->wrapped = true;
	}
	return PACKET_MALFORMED;
}

static __always_inline enum packet packet_ip4(struct __sk_buff *skb, struct packet_place *p, struct flow *f)
{
	struct {
		__u8 version, tos;
		__be16 len, id, fragment;
		__u8 ttl, protocol;
		__be16 sum;
		__be32 source, destination;
	} ip;

	if (!packet_has(p, sizeof(ip)) || bpf_skb_load_bytes(skb, p->at, &ip, sizeof(ip)))
		return PACKET_MALFORMED;
	p->next = ip.protocol;
	__u16 offset = bpf_ntohs(ip.fragment) & 0x1fff;
	if (offset == 1 && ip.protocol == IPPROTO_TCP)
		return PACKET_MALFORMED; /* would overwrite the flags: RFC 3128 */
	if (offset && (ip.protocol == IPPROTO_IPIP || ip.protocol == IPPROTO_IPV6))
		return PACKET_MALFORMED; /* likewise, wherever the flags inside are. IPv6 lets nothing overlap: RFC 5722 */
	if (offset)
		return PACKET_OTHER;
	f->local = from_ip4(ip.source);
	f->remote = from_ip4(ip.destination);
	packet_ends(p, p->at + bpf_ntohs(ip.len));
	p->cut |= !!(ip.fragment & bpf_htons(0x2000));
	p->at += (ip.version & 0xf) * 4;
	return PACKET_SYN;
}

static __always_inline enum packet packet_ip6(struct __sk_buff *skb, struct packet_place *p, struct flow *f)
{
	struct {
		__be32 flow;
		__be16 len;
		__u8 next, hops;
		struct address source, destination;
	} ip;

	if (!packet_has(p, sizeof(ip)) || bpf_skb_load_bytes(skb, p->at, &ip, sizeof(ip)))
		return PACKET_MALFORMED;
	p->next = ip.next;
	f->local = ip.source;
	f->remote = ip.destination;
	p->at += sizeof(ip);
	packet_ends(p, p->at + bpf_ntohs(ip.len));
	return PACKET_SYN;
}

/* Hop-by-hop, routing, fragment, destination options: RFC 8200 section 4. */
static __always_inline enum packet packet_extension(struct __sk_buff *skb, struct packet_place *p)
{
	struct {
		__u8 next, len;
		__be16 fragment;
	} ext;

	if (!packet_has(p, sizeof(ext)) || bpf_skb_load_bytes(skb, p->at, &ext, sizeof(ext)))
		return PACKET_MALFORMED;
	if (p->next == IPPROTO_FRAGMENT) {
		__u16 offset = bpf_ntohs(ext.fragment) & 0xfff8;

		if (offset == 8)
			return PACKET_MALFORMED; /* as with IPv4, whatever it says is next: only the first one's word counts */
		if (offset)
			return PACKET_OTHER;
		p->cut |= !!(ext.fragment & bpf_htons(1));
		p->at += 8;
	} else {
		p->at += (ext.len + 1) * 8;
	}
	p->next = ext.next;
	return PACKET_SYN;
}

static __always_inline enum packet packet_tcp(struct __sk_buff *skb, struct packet_place *p, struct flow *f)
{
	struct {
		__be16 source, destination;
	} ports;
	__u8 flags;

	if (!packet_has(p, 14) || bpf_skb_load_bytes(skb, p->at, &ports, sizeof(ports)) || bpf_skb_load_bytes(skb, p->at + 13, &flags, 1))
		return PACKET_MALFORMED;
	f->local_port = ports.source;
	f->remote_port = ports.destination;
	return (flags & 0x12) == 0x02 ? PACKET_SYN : PACKET_OTHER; /* SYN without ACK */
}

/* One header that is not TCP's. A global function, which the verifier reads by itself and once: read in its place, it
 * would be followed into every order that eight headers may come in, for each pod's gate anew. */
__noinline int packet_header(struct __sk_buff *skb, struct packet_place *p, struct flow *f, bool inner)
{
	if (!p || !f)
		return PACKET_MALFORMED;
	switch (p->next) {
	case IPPROTO_IPIP:
		p->wrapped |= inner;
		return packet_ip4(skb, p, f);
	case IPPROTO_IPV6:
		p->wrapped |= inner;
		return packet_ip6(skb, p, f);
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_FRAGMENT:
	case IPPROTO_DSTOPTS:
		return packet_extension(skb, p);
	default:
		return PACKET_OTHER;
	}
}

/* Fills f in from the innermost IP and TCP headers: nodes unpack IP in IP for whoever sends it. */
static __always_inline enum packet packet_read(struct __sk_buff *skb, struct packet_place *p, struct flow *f)
{
	enum packet is = packet_ether(skb, p);
	int i = 0;

	for (; i < PACKET_HEADERS && is == PACKET_SYN && p->next != IPPROTO_TCP; i++)
		is = packet_header(skb, p, f, i > 0);
	if (is != PACKET_SYN)
		return is;
	return i < PACKET_HEADERS ? packet_tcp(skb, p, f) : PACKET_MALFORMED;
}
