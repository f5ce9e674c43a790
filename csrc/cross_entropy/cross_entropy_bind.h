#pragma once

#include "base/binding.h"
#include "cross_entropy/cross_entropy.h"

namespace megatron_lite {

inline void check_vocabulary_part(const Rows& shape, int64_t first, int64_t held) {
  STD_TORCH_CHECK(first >= 0, "a part of a vocabulary begins at ", first);
  STD_TORCH_CHECK(held >= 0 && held <= shape.length, held, " columns are to be read of ", shape.length);
}

template <class Device>
Tensor cross_entropy_statistics(const Tensor& logits, const Tensor& labels, int64_t first, int64_t held) {
  const Rows shape(logits);
  check_vocabulary_part(shape, first, held);
  const Tensor x = prepared(logits, logits), ids = prepared(labels, logits, ScalarType::Long);
  check_elements(ids, shape.rows, "labels");
  Tensor statistics = new_float(x, {4, shape.rows});
  run<Device>(x, CrossEntropyStatistics{
                     .dtype = dtype_of(x),
                     .logits = x.const_data_ptr(),
                     .labels = static_cast<const int64_t*>(ids.const_data_ptr()),
                     .statistics = static_cast<float*>(statistics.mutable_data_ptr()),
                     .first = first,
                     .held = held,
                     .rows = shape.rows,
                     .length = shape.length,
                 });
  return statistics;
}

template <class Device>
void cross_entropy_gradient_(const Tensor& logits, const Tensor& labels, const Tensor& top, const Tensor& factor,
                             const Tensor& gradient, int64_t first, int64_t held, double label_smoothing,
                             int64_t vocab_size) {
  const Rows shape(logits);
  check_vocabulary_part(shape, first, held);
  STD_TORCH_CHECK(logits.is_contiguous(), "the logits become their gradient in place and must be contiguous");
  const Tensor ids = prepared(labels, logits, ScalarType::Long);
  check_elements(ids, shape.rows, "labels");
  const Tensor of_rows[] = {prepared(top, logits, ScalarType::Float), prepared(factor, logits, ScalarType::Float),
                            prepared(gradient, logits, ScalarType::Float)};
  for (const Tensor& values : of_rows) check_elements(values, shape.rows, "what is given of each row");
  run<Device>(logits, CrossEntropyGradient{
                          .dtype = dtype_of(logits),
                          .logits = logits.mutable_data_ptr(),
                          .labels = static_cast<const int64_t*>(ids.const_data_ptr()),
                          .top = static_cast<const float*>(of_rows[0].const_data_ptr()),
                          .factor = static_cast<const float*>(of_rows[1].const_data_ptr()),
                          .gradient = static_cast<const float*>(of_rows[2].const_data_ptr()),
                          .first = first,
                          .held = held,
                          .rows = shape.rows,
                          .length = shape.length,
                          .at_target = static_cast<float>(1 - label_smoothing),
                          .everywhere = static_cast<float>(label_smoothing / static_cast<double>(vocab_size)),
                      });
}

template <class Device>
void register_cross_entropy(torch::stable::detail::StableLibrary& library) {
  library.impl("cross_entropy_statistics", TORCH_BOX(&cross_entropy_statistics<Device>));
  library.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_<Device>));
}

}  // namespace megatron_lite
