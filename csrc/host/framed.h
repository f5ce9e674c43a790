// Ids of documents as a token set has them: in its width, with the tokens that begin and end a document, and counted.
// The same as megatron_lite/data/framing.py has in numpy, in one pass over the ids.

#pragma once

#include <cstdint>
#include <optional>

namespace megatron_lite {

struct Frame {
  std::optional<int64_t> bos;  // begins each document
  std::optional<int64_t> eod;  // ends each that has tokens
};

// Tokens that documents of these lengths have in their frames; `lengths` becomes that. -1 if one is negative, or all
// together are not `ids`.
inline int64_t add_frames(const Frame& frame, int64_t ids, int32_t* lengths, int64_t documents) {
  int64_t bare = 0, framed = 0;
  for (int64_t i = 0; i < documents; ++i) {
    if (lengths[i] < 0) return -1;
    bare += lengths[i];
    lengths[i] += frame.bos.has_value();
    lengths[i] += frame.eod && lengths[i] > 0;
    framed += lengths[i];
  }
  return bare == ids ? framed : -1;
}

// Writes the documents of framed `lengths` to `to` and adds up how often each of `vocabulary` ids occurs. Returns the
// first id that is none of them, which ends it, or -1.
template <typename Token>
int64_t put_framed(const Frame& frame, const int32_t* ids, const int32_t* lengths, int64_t documents,
                   uint32_t* counts, int64_t vocabulary, Token* to) {
  for (int64_t document = 0; document < documents; ++document) {
    if (!lengths[document]) continue;
    int64_t bare = lengths[document];
    if (frame.bos) *to++ = static_cast<Token>(*frame.bos), ++counts[*frame.bos], --bare;
    if (frame.eod) --bare;
    for (const int32_t* end = ids + bare; ids < end; ++ids) {
      const uint32_t id = static_cast<uint32_t>(*ids);
      if (id >= static_cast<uint64_t>(vocabulary)) return id;
      *to++ = static_cast<Token>(id);
      ++counts[id];
    }
    if (frame.eod) *to++ = static_cast<Token>(*frame.eod), ++counts[*frame.eod];
  }
  return -1;
}

}  // namespace megatron_lite
