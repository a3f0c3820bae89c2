// The descriptor router: an SK_MSG program that runs in the sender's send(2) and moves 16-byte descriptors
// straight into the receiver's queue. No process stands between the two.
//
// It ALWAYS returns SK_PASS. A message that was redirected is gone by then; any other goes the ordinary way of
// its TCP connection, to the sender's own far socket, where the sender finds what was not delivered. SK_DROP
// would make every later send of that socket fail for ever.
//
// Compiled by BCC (lifl_ebpf/compiler.py) with CREDIT and MAX_ENDPOINTS defined.
#include <uapi/linux/bpf.h>

#define DESCRIPTOR_BYTES 16
#define MAX_BATCH 64

struct descriptor {
    u32 destination;
    u32 source;
    u32 slot;
    u16 round;
    u8 kind;
    u8 generation;
};

// Who a sending socket is. `index` is its place in `traffic`; endpoint ids themselves are sparse.
struct identity {
    u32 endpoint;
    u32 index;
};

// Counters of one endpoint, one cache line; the order is known to lifl_ebpf/router.py.
struct traffic {
    u64 descriptors;  // delivered to it; less `consumed` of its credit page, those that wait there
    u64 bytes;
    u64 last;         // CLOCK_MONOTONIC, nanoseconds
    u64 interarrival; // eight times the exponentially weighted mean, nanoseconds
    u64 denied;       // descriptors it sent to where it may not
    u64 unroutable;   // descriptors for it that found nobody
    u64 full;         // descriptors for it that exceeded its credit
    u64 unused;
};

// The page that belongs to one receiver, which maps and writes it without a system call.
struct credit_page {
    u64 consumed;
};

BPF_SOCKHASH(sockets, u32, MAX_ENDPOINTS);
BPF_SK_STORAGE(identities, struct identity);
// endpoint -> place in `traffic` and `credits`; place 0 counts for destinations that nobody has
BPF_F_TABLE("hash", u32, u32, destinations, MAX_ENDPOINTS, BPF_F_NO_PREALLOC);
// source << 32 | destination
BPF_F_TABLE("hash", u64, u8, policies, 65536, BPF_F_NO_PREALLOC);
BPF_F_TABLE("array", u32, struct traffic, traffic, MAX_ENDPOINTS, BPF_F_MMAPABLE);
// One map of one page for each receiver: a shared map would let one worker write another's count.
BPF_F_TABLE("array", u32, struct credit_page, credit_template, 1, BPF_F_MMAPABLE);
BPF_ARRAY_OF_MAPS(credits, "credit_template", MAX_ENDPOINTS);

// One descriptor of a send: write the true source, see that the destination is that of the first.
// Unrolled by hand, in steps of constant size: the agent has no CAP_PERFMON, and without it the verifier follows
// mispredicted branches round a loop for ever and forbids variable offsets into a message.
#define STAMP_1                                                                                                        \
    if (!left)                                                                                                         \
        goto stamped;                                                                                                  \
    if ((void *)(descriptor + 1) > end)                                                                                \
        return SK_PASS;                                                                                                \
    difference |= descriptor->destination ^ destination;                                                               \
    descriptor->source = source;                                                                                       \
    descriptor++;                                                                                                      \
    left--;
#define STAMP_4 STAMP_1 STAMP_1 STAMP_1 STAMP_1
#define STAMP_16 STAMP_4 STAMP_4 STAMP_4 STAMP_4
#define STAMP_64 STAMP_16 STAMP_16 STAMP_16 STAMP_16 // MAX_BATCH

static __always_inline u64 *consumed_of(u32 index)
{
    u32 first = 0;
    void *inner = credits.lookup(&index);
    if (!inner)
        return NULL;
    struct credit_page *page = bpf_map_lookup_elem(inner, &first);
    return page ? &page->consumed : NULL;
}

static __always_inline void count_delivery(struct traffic *to, u32 count, u32 size)
{
    u64 now = bpf_ktime_get_ns();
    u64 last = to->last;
    u64 mean = to->interarrival;

    __sync_fetch_and_add(&to->descriptors, count);
    __sync_fetch_and_add(&to->bytes, size);
    // Two senders at the same instant may lose one of the samples: a mean does not mind.
    if (last && now > last) {
        u64 gap = (now - last) / count;
        to->interarrival = mean ? mean + gap - (mean >> 3) : gap << 3;
    }
    to->last = now;
}

int route(struct sk_msg_md *message)
{
    if (!message->sk)
        return SK_PASS;
    struct identity *sender = identities.sk_storage_get(message->sk, 0, 0);
    if (!sender)
        return SK_PASS;
    u32 sender_index = sender->index;
    u32 source = sender->endpoint;
    struct traffic *from = traffic.lookup(&sender_index);
    if (!from)
        return SK_PASS;

    u32 size = message->size;
    u32 count = size / DESCRIPTOR_BYTES;
    if (size % DESCRIPTOR_BYTES || size > MAX_BATCH * DESCRIPTOR_BYTES || !count) {
        __sync_fetch_and_add(&from->denied, count ? count : 1);
        return SK_PASS;
    }
    // The bytes may lie in two pages, or (splice) in one that the sender could still change: copies then, else
    // does nothing.
    if (bpf_msg_pull_data(message, 0, size, 0))
        return SK_PASS;
    struct descriptor *descriptor = (void *)(long)message->data;
    void *end = (void *)(long)message->data_end;
    if ((void *)(descriptor + 1) > end)
        return SK_PASS;
    u32 destination = descriptor->destination;
    u32 difference = 0;
    u32 left = count;
    STAMP_64
stamped:
    if (difference) {
        __sync_fetch_and_add(&from->denied, count);
        return SK_PASS;
    }

    u32 nobody = 0;
    u32 *index = destinations.lookup(&destination);
    struct traffic *to = index ? traffic.lookup(index) : traffic.lookup(&nobody);
    if (!to)
        return SK_PASS;
    if (!index) {
        __sync_fetch_and_add(&to->unroutable, count);
        return SK_PASS;
    }
    u64 pair = (u64)source << 32 | destination;
    if (!policies.lookup(&pair)) {
        __sync_fetch_and_add(&from->denied, count);
        return SK_PASS;
    }
    u64 *consumed = consumed_of(*index);
    if (!consumed)
        return SK_PASS;
    // A receiver that claims more than it got makes this huge, and gets nothing any more. Senders on several
    // processors may together exceed the credit by one send each.
    u64 waiting = to->descriptors - *(volatile u64 *)consumed;
    if (waiting > CREDIT - count) {
        __sync_fetch_and_add(&to->full, count);
        return SK_PASS;
    }
    if (sockets.msg_redirect_hash(message, &destination, BPF_F_INGRESS) != SK_PASS) {
        __sync_fetch_and_add(&to->unroutable, count);
        return SK_PASS;
    }
    count_delivery(to, count, size);
    return SK_PASS;
}
