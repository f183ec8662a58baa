// Slot arithmetic of the ring: only integers, no torch, for host and device. The same formulas in Python:
// sinkattn/reference.py; in Triton: sinkattn/kernels.
//
// Token t (0-based in its stream) is written to slot t if t < num_sinks, where it stays for ever; else to slot
// ring_slot() + (t - num_sinks) mod ring(), where a later token overwrites it. A row may have fewer sinks than there are
// slots for in its cache: the others are unused. Token counts are 64-bit, since streams are endless.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SINKATTN_HOST_DEVICE __host__ __device__
#else
#define SINKATTN_HOST_DEVICE
#endif

// For loops of about one iteration on a GPU: unrolling adds a division to compute the trip count.
#if defined(__CUDA_ARCH__)
#define SINKATTN_NO_UNROLL _Pragma("unroll 1")
#else
#define SINKATTN_NO_UNROLL
#endif

namespace sinkattn {

// Largest token count: the sum of two counts cannot overflow.
constexpr int64_t kMaxTokens = int64_t{1} << 61;

// `count` consecutive tokens, starting with `token`, in consecutive slots, starting with `slot`.
struct Run {
  int64_t token;
  int64_t slot;
  int64_t count;
};

struct RingLayout {
  int64_t num_sinks;
  int64_t window;
  int64_t headroom;
  int64_t unused = 0;  // slots between the sinks and the ring
  int64_t begin = 0;   // first token that a window may hold

  // Most runs that an append writes or that the slots hold: sinks and two parts of the ring.
  static constexpr int kMaxRuns = 3;

  SINKATTN_HOST_DEVICE constexpr int64_t ring() const { return window + headroom; }
  SINKATTN_HOST_DEVICE constexpr int64_t ring_slot() const { return num_sinks + unused; }
  SINKATTN_HOST_DEVICE constexpr int64_t slots() const { return ring_slot() + ring(); }

  // The layout of a row with at most as many sinks, in the same slots.
  SINKATTN_HOST_DEVICE constexpr RingLayout of_row(int64_t sinks, int64_t first) const {
    return {sinks, window, headroom, ring_slot() - sinks, first};
  }

  // Slot that holds a token.
  SINKATTN_HOST_DEVICE constexpr int64_t slot(int64_t token) const {
    return token < num_sinks ? token : ring_slot() + (token - num_sinks) % ring();
  }

  // How many tokens older than `token` the token in a ring slot is, once `token` is the last one written. Requires
  // token >= num_sinks and slot >= ring_slot().
  SINKATTN_HOST_DEVICE constexpr int64_t age(int64_t token, int64_t slot) const {
    const int64_t distance = (token - num_sinks) % ring() - (slot - ring_slot());
    return distance < 0 ? distance + ring() : distance;
  }

  // First token of the window of the query of `token`; token + 1 if the window is empty.
  SINKATTN_HOST_DEVICE constexpr int64_t window_begin(int64_t token) const {
    if (token < num_sinks) return token + 1;
    const int64_t oldest = token - window + 1, first = begin < num_sinks ? num_sinks : begin;
    return oldest < first ? first : oldest;
  }

  // Whether the query of `token` sees the key in a slot, once `token` itself is written.
  SINKATTN_HOST_DEVICE constexpr bool visible(int64_t token, int64_t slot) const {
    if (slot < num_sinks) return slot <= token;
    return slot >= ring_slot() && token >= num_sinks && age(token, slot) <= token - window_begin(token);
  }

  // Cache-relative rotary position of the query of `token`: the number of keys it sees, minus one.
  SINKATTN_HOST_DEVICE constexpr int64_t position(int64_t token) const {
    return token < num_sinks ? token : num_sinks + token - window_begin(token);
  }

  // What the slots hold after `end` tokens, in slot order. `Run::token` counts from the start of the stream. Fills
  // `runs` and returns their number.
  SINKATTN_HOST_DEVICE constexpr int held_runs(int64_t end, Run* runs) const {
    int n = 0;
    if (end > 0 && num_sinks > 0) runs[n++] = Run{0, 0, end < num_sinks ? end : num_sinks};
    if (end <= num_sinks) return n;
    const int64_t newest = end - 1;
    const int64_t newer = slot(newest) - ring_slot() + 1;  // slots from the start of the ring to the newest token
    runs[n++] = Run{newest - newer + 1, ring_slot(), newer};
    const int64_t older = ring() - newer;
    if (end - num_sinks > newer && older > 0) runs[n++] = Run{newest - ring() + 1, ring_slot() + newer, older};
    return n;
  }

  // Slots that an append of `count` tokens after `seen` writes. `Run::token` counts from the first appended token.
  // Tokens that later tokens of the same append overwrite are left out, so each slot occurs at most once. Fills `runs`
  // and returns their number.
  SINKATTN_HOST_DEVICE constexpr int write_runs(int64_t seen, int64_t count, Run* runs) const {
    int n = 0;
    const int64_t end = seen + count;
    if (seen < num_sinks && count > 0) {
      runs[n++] = Run{0, seen, (end < num_sinks ? end : num_sinks) - seen};
    }
    int64_t first = seen < num_sinks ? num_sinks : seen;
    if (end - first > ring()) first = end - ring();
    if (first < end) {
      const int64_t first_slot = slot(first);
      const int64_t room = slots() - first_slot;
      const int64_t total = end - first;
      const int64_t before_wrap = total < room ? total : room;
      runs[n++] = Run{first - seen, first_slot, before_wrap};
      if (before_wrap < total) runs[n++] = Run{first - seen + before_wrap, ring_slot(), total - before_wrap};
    }
    return n;
  }

  // The i-th token that write_runs(seen, count) lists, or `count` if it lists no more than i.
  SINKATTN_HOST_DEVICE constexpr int64_t written_token(int64_t seen, int64_t count, int64_t i) const {
    const int64_t room = seen < num_sinks ? num_sinks - seen : 0;
    const int64_t sinks = count < room ? count : room;
    if (i < sinks) return i;
    const int64_t overwritten = count - sinks - ring();
    const int64_t token = i + (overwritten > 0 ? overwritten : 0);
    return token < count ? token : count;
  }
};

}  // namespace sinkattn
