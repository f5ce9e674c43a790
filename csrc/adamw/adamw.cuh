// Tables of what AdamW updates: a kernel is compiled for one pair of dtypes, so a table holds tensors of one pair.

#pragma once

#include "adamw/adamw.h"
#include "base/table.cuh"

namespace megatron_lite::cuda {

// Calls run(Element(), Gradient(), table, chunks) for as few tables as hold all tensors.
template <class OfTensor, class Run>
Status for_tables_of_pairs(const OfTensor* tensors, int64_t count, int64_t chunk_length, const Run& run) {
  Status failed = kSuccess;
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
    for (const Dtype gradient_dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
      const auto wanted = [=](const OfTensor& of) { return of.dtype == dtype && of.gradient_dtype == gradient_dtype; };
      for_tables(tensors, count, chunk_length, wanted, [&](const Table<OfTensor>& table, int64_t chunks) {
        with_element(dtype, [&](auto element) {
          const Status status = with_element(gradient_dtype, [&](auto gradient) {
            run(element, gradient, table, chunks);
          });
          if (!failed) failed = status;
        });
      });
    }
  }
  return failed;
}

}  // namespace megatron_lite::cuda
