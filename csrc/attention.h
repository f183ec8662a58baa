// Streaming attention on the CPU, without torch: append new tokens to the ring and attend over sinks and window.
// The kernel is compiled once for each instruction set (attention_*.cpp) and chosen when it runs.
#pragma once

#include <cstdint>

#include "ring.h"

namespace sinkattn {

enum class CacheType { kFloat, kDouble, kHalf, kBFloat16 };

// Elements anywhere in memory; strides count elements.
struct Strided {
  const void* data = nullptr;
  int64_t stride[4] = {};

  template <typename T>
  const T* at(int64_t i, int64_t j, int64_t k) const {
    return static_cast<const T*>(data) + i * stride[0] + j * stride[1] + k * stride[2];
  }
};

// One call. Accumulation is in fp32, in fp64 for an fp64 cache; so are cos, sin, sink_logits and alibi_slopes.
struct AttentionCall {
  CacheType type;
  RingLayout layout;
  int64_t batch, heads, kv_heads, tokens, head_dim, value_dim;
  void* keys;              // [batch, kv_heads, slots, head_dim], contiguous
  void* values;            // [batch, kv_heads, slots, value_dim], contiguous
  Strided query;           // [batch, heads, tokens, head_dim], not rotated
  Strided key, value;      // [batch, kv_heads, tokens, head_dim or value_dim], not rotated
  const int64_t* seen;     // [batch] tokens appended before
  const int64_t* lengths;  // [batch] tokens that a row really brings, or null for all
  Strided cos, sin;        // [2, batch, tokens, pairs] at stream and at cache-relative positions; no data: no rotation
  int64_t pairs;
  bool interleaved;
  double scale;
  double softcap;            // 0 for none
  const void* sink_logits;   // [heads] or null
  const void* alibi_slopes;  // [heads] or null
  void* out;                 // [batch, tokens, heads, value_dim], contiguous
};

// What the kernel needs of whoever calls it: threads and memory.
class Workers {
 public:
  virtual int64_t count() const = 0;
  // Calls work(context, i) for i in [0, workers), on as many threads as there are, and returns when all are done.
  virtual void run(int64_t workers, void (*work)(void* context, int64_t worker), void* context) = 0;
  // Memory for this call, aligned to 64 bytes, uninitialised, valid until the next request.
  virtual char* workspace(int64_t bytes) = 0;

 protected:
  ~Workers() = default;
};

struct InstructionSet {
  const char* name;
  bool (*available)();
  void (*attend)(const AttentionCall& call, Workers& workers);
};

// Best first; the last one is always available.
extern const InstructionSet kInstructionSets[];
extern const int kInstructionSetCount;

}  // namespace sinkattn
