// Slot arithmetic of the ring: integers only, no torch, usable on host and device.
//
// The cache of one stream has `num_sinks + ring()` slots. Token t (0-based in its stream) sits for ever in slot t
// when t < num_sinks, else in slot num_sinks + (t - num_sinks) mod ring(), until a later token takes that slot.
// Token counts are 64-bit: a stream has no end.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SINKATTN_HOST_DEVICE __host__ __device__
#else
#define SINKATTN_HOST_DEVICE
#endif

// For loops that seldom go round twice on a device: unrolled, they would first divide to count their turns.
#if defined(__CUDA_ARCH__)
#define SINKATTN_ROLLED _Pragma("unroll 1")
#else
#define SINKATTN_ROLLED
#endif

namespace sinkattn {

// Counts stay below this, so that no sum of two of them overflows.
constexpr int64_t kMaxTokens = int64_t{1} << 61;

// `count` consecutive tokens, from `token` on, in consecutive slots.
struct Run {
  int64_t token;
  int64_t slot;
  int64_t count;
};

struct RingLayout {
  int64_t num_sinks;
  int64_t window;
  int64_t headroom;

  // Sinks and two parts of the ring: appending any number of tokens writes no more runs, and slots hold no more.
  static constexpr int kMaxRuns = 3;

  SINKATTN_HOST_DEVICE constexpr int64_t ring() const { return window + headroom; }
  SINKATTN_HOST_DEVICE constexpr int64_t slots() const { return num_sinks + ring(); }

  // Slot of a token.
  SINKATTN_HOST_DEVICE constexpr int64_t slot(int64_t token) const {
    return token < num_sinks ? token : num_sinks + (token - num_sinks) % ring();
  }

  // How many tokens before `token` the newest occupant of a ring slot came, counting tokens up to `token` alone;
  // needs token >= num_sinks and slot >= num_sinks.
  SINKATTN_HOST_DEVICE constexpr int64_t age(int64_t token, int64_t slot) const {
    const int64_t distance = (token - num_sinks) % ring() - (slot - num_sinks);
    return distance < 0 ? distance + ring() : distance;
  }

  // First token of the window that the query of `token` sees (the window may be empty: then token + 1).
  SINKATTN_HOST_DEVICE constexpr int64_t window_begin(int64_t token) const {
    if (token < num_sinks) return token + 1;
    const int64_t begin = token - window + 1;
    return begin < num_sinks ? num_sinks : begin;
  }

  // Whether the query of `token` sees what a slot holds, once `token` itself is written.
  SINKATTN_HOST_DEVICE constexpr bool visible(int64_t token, int64_t slot) const {
    if (slot < num_sinks) return slot <= token;
    return token >= num_sinks && age(token, slot) <= token - window_begin(token);
  }

  // Cache-relative rotary position of the query of `token`: the number of keys it sees, less one.
  SINKATTN_HOST_DEVICE constexpr int64_t position(int64_t token) const {
    const int64_t last = num_sinks + window - 1;
    return token < last ? token : last;
  }

  // What the slots hold once `end` tokens have come, in the order of the slots: runs of consecutive tokens, `token`
  // counted from the start of the stream. Fills `runs` and returns how many there are.
  SINKATTN_HOST_DEVICE constexpr int held_runs(int64_t end, Run* runs) const {
    int n = 0;
    if (end > 0 && num_sinks > 0) runs[n++] = Run{0, 0, end < num_sinks ? end : num_sinks};
    if (end <= num_sinks) return n;
    const int64_t newest = end - 1;
    const int64_t newer = slot(newest) - num_sinks + 1;  // from the start of the ring up to the newest token
    runs[n++] = Run{newest - newer + 1, num_sinks, newer};
    const int64_t older = ring() - newer;
    if (end - num_sinks > newer && older > 0) runs[n++] = Run{newest - ring() + 1, num_sinks + newer, older};
    return n;
  }

  // Where `count` tokens appended after `seen` are written, `token` counted from the first of them. Tokens that the
  // same call would overwrite are left out. Fills `runs` and returns how many there are; no slot is named twice.
  SINKATTN_HOST_DEVICE constexpr int write_runs(int64_t seen, int64_t count, Run* runs) const {
    int n = 0;
    const int64_t end = seen + count;
    if (seen < num_sinks && count > 0) {
      runs[n++] = Run{0, seen, (end < num_sinks ? end : num_sinks) - seen};
    }
    int64_t begin = seen < num_sinks ? num_sinks : seen;
    if (end - begin > ring()) begin = end - ring();
    if (begin < end) {
      const int64_t first_slot = slot(begin);
      const int64_t room = slots() - first_slot;
      const int64_t total = end - begin;
      const int64_t before_wrap = total < room ? total : room;
      runs[n++] = Run{begin - seen, first_slot, before_wrap};
      if (before_wrap < total) runs[n++] = Run{begin - seen + before_wrap, num_sinks, total - before_wrap};
    }
    return n;
  }

  // The i-th token that the same append writes, in the order of its runs and counted as there; `count` if it writes
  // fewer.
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
