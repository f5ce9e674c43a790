#pragma once

#include "base/binding.h"
#include "quantize_blockwise/quantize_blockwise.h"

namespace megatron_lite {

template <class Device>
std::tuple<Tensor, Tensor> quantize_blockwise(const Tensor& input, bool is_signed) {
  const Tensor x = prepared(input, input);
  Tensor codes = torch::stable::new_empty(x, x.sizes(), ScalarType::Byte);
  Tensor absmax = new_float(x, {quantize_blocks(x.numel())});
  run<Device>(x, QuantizeBlockwise{
                     .dtype = dtype_of(x),
                     .is_signed = is_signed,
                     .input = x.const_data_ptr(),
                     .codes = static_cast<uint8_t*>(codes.mutable_data_ptr()),
                     .absmax = static_cast<float*>(absmax.mutable_data_ptr()),
                     .length = x.numel(),
                 });
  return {codes, absmax};
}

template <class Device>
Tensor dequantize_blockwise(const Tensor& codes, const Tensor& absmax, bool is_signed, ScalarType dtype) {
  const Tensor bytes = prepared(codes, codes, ScalarType::Byte);
  const Tensor scales = prepared(absmax, codes, ScalarType::Float);
  check_elements(scales, quantize_blocks(bytes.numel()), "absmax");
  Tensor output = torch::stable::new_empty(bytes, bytes.sizes(), dtype);
  run<Device>(bytes, DequantizeBlockwise{
                         .dtype = dtype_of(output),
                         .is_signed = is_signed,
                         .codes = static_cast<const uint8_t*>(bytes.const_data_ptr()),
                         .absmax = static_cast<const float*>(scales.const_data_ptr()),
                         .output = output.mutable_data_ptr(),
                         .length = bytes.numel(),
                     });
  return output;
}

template <class Device>
void register_quantize_blockwise(torch::stable::detail::StableLibrary& library) {
  library.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise<Device>));
  library.impl("dequantize_blockwise", TORCH_BOX(&dequantize_blockwise<Device>));
}

}  // namespace megatron_lite
