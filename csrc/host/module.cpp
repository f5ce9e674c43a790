// megatron_lite._host: what is no tensor operation and too slow in Python. Needs neither torch nor a GPU.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/best_fit.h"
#include "host/crc32.h"
#include "host/document_bounds.h"
#include "host/draws.h"
#include "host/fill_in.h"
#include "host/framed.h"
#include "host/permutation.h"

namespace py = pybind11;
using megatron_lite::DocumentBounds;
using megatron_lite::FillIn;
using megatron_lite::Permutation;
using megatron_lite::UnalignedArray;

namespace {

// `count` int64 values of a buffer from byte `offset` on.
UnalignedArray array_in(const py::buffer_info& buffer, int64_t offset, int64_t count) {
  if (buffer.itemsize != 1 || offset < 0 || count < 0 || offset > buffer.size || (buffer.size - offset) / 8 < count)
    throw py::value_error("an array that leaves its buffer");
  return {static_cast<const unsigned char*>(buffer.ptr) + offset, count};
}

using Counts = py::array_t<uint32_t, py::array::c_style>;

// Ids of documents in their frames, and the first id that is none; `lengths` are those of the framed documents.
template <typename Token>
std::pair<py::array, int64_t> framed_ids(const megatron_lite::Frame& frame, const py::array_t<int32_t>& ids,
                                         const py::array_t<int32_t>& lengths, int64_t total, Counts& counts) {
  py::array_t<Token> made(total);
  Token* to = made.mutable_data();
  uint32_t* count = counts.mutable_data();
  int64_t outside;
  {
    py::gil_scoped_release release;
    outside = megatron_lite::put_framed(frame, ids.data(), lengths.data(), lengths.size(), count, counts.size(), to);
  }
  return {std::move(made), outside};
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "What is no tensor operation and too slow in Python.";

  py::class_<Permutation>(module, "Permutation",
                          "data/order.py's permutation of 0 .. n - 1 from its 16 keys; indices are not checked.")
      .def(py::init<uint64_t, const std::array<uint32_t, 16>&>(), py::arg("n"), py::arg("keys"))
      .def("__call__", &Permutation::operator(), py::arg("index"))
      .def(
          "many",
          [](const Permutation& permutation, const py::array_t<uint64_t, py::array::c_style>& indices) {
            py::array_t<int64_t> result(std::vector<py::ssize_t>(indices.shape(), indices.shape() + indices.ndim()));
            const uint64_t* from = indices.data();
            int64_t* to = result.mutable_data();
            const py::ssize_t count = indices.size();
            py::gil_scoped_release release;
            for (py::ssize_t i = 0; i < count; ++i) to[i] = static_cast<int64_t>(permutation(from[i]));
            return result;
          },
          py::arg("indices"), "int64, of the shape of `indices` (uint64).");

  module.def(
      "draws_of_a_period",
      [](const std::vector<int64_t>& counts) {
        const std::vector<int32_t> draws = megatron_lite::draws_of_a_period(counts);
        return py::array_t<int32_t>(draws.size(), draws.data());
      },
      py::arg("counts"), "int32: data/blend.py's order of the draws of a period, from how often each set comes in it.");

  module.def(
      "best_fit",
      [](const py::array_t<int32_t, py::array::c_style>& sizes, int32_t capacity) {
        megatron_lite::Bins bins;
        {
          py::gil_scoped_release release;
          bins = megatron_lite::best_fit(sizes.data(), static_cast<int32_t>(sizes.size()), capacity);
        }
        return py::make_tuple(py::array_t<int32_t>(bins.items.size(), bins.items.data()),
                              py::array_t<int32_t>(bins.starts.size(), bins.starts.data()));
      },
      py::arg("sizes"), py::arg("capacity"),
      "int32 [items] and [bins + 1]: data/pack.py's items of each bin one after another, and where each bin begins.");

  module.def(
      "crc32",
      [](const py::buffer& data, uint32_t value) {
        const py::buffer_info bytes = data.request();
        if (!PyBuffer_IsContiguous(bytes.view(), 'C')) throw py::value_error("bytes that do not follow one another");
        py::gil_scoped_release release;
        return megatron_lite::crc32(value, static_cast<const unsigned char*>(bytes.ptr), bytes.size * bytes.itemsize);
      },
      py::arg("data"), py::arg("value") = 0, "zlib's checksum of the bytes of a buffer, going on from `value`.");

  py::class_<DocumentBounds>(module, "DocumentBounds",
                             "Where documents begin, for data/indexed.py; tokens are not checked.")
      .def(py::init([](const py::buffer& index, int64_t pointers_at, int64_t sequences, int64_t documents_at,
                       int64_t bounds, int64_t width) {
             const py::buffer_info bytes = index.request();
             return DocumentBounds(array_in(bytes, pointers_at, sequences), array_in(bytes, documents_at, bounds),
                                   width);
           }),
           py::arg("index"), py::arg("pointers_at"), py::arg("sequences"), py::arg("documents_at"), py::arg("bounds"),
           py::arg("width"), py::keep_alive<1, 2>())
      .def("document_at", &DocumentBounds::document_at, py::arg("token"))
      .def(
          "starts",
          [](const DocumentBounds& bounds, int64_t start, int64_t stop) {
            const std::vector<int64_t> found = bounds.starts(start, stop);
            return py::array_t<int64_t>(found.size(), found.data());
          },
          py::arg("start"), py::arg("stop"), "int64, counted from `start`, ascending from 0.")
      .def(
          "of",
          [](const DocumentBounds& bounds, const py::array_t<int64_t, py::array::c_style>& documents, int64_t end) {
            py::array_t<int64_t> starts(documents.size()), ends(documents.size());
            for (py::ssize_t i = 0; i < documents.size(); ++i) {
              const int64_t document = documents.data()[i];
              if (document < 0 || document >= bounds.documents()) throw py::index_error("a document that is not there");
              starts.mutable_data()[i] = bounds.first_token(document, end);
              ends.mutable_data()[i] = bounds.first_token(document + 1, end);
            }
            return py::make_tuple(starts, ends);
          },
          py::arg("documents"), py::arg("end"), "int64, int64: where documents of a stream of `end` tokens lie.");

  module.def(
      "framed",
      [](const py::array_t<int32_t, py::array::c_style>& ids, const py::array_t<int64_t, py::array::c_style>& lengths,
         std::optional<int64_t> bos, std::optional<int64_t> eod, int width, Counts counts) {
        const megatron_lite::Frame frame{bos, eod};
        for (const auto& id : {bos, eod})
          if (id && (*id < 0 || *id >= counts.size())) throw py::value_error("a frame outside the vocabulary");
        py::array_t<int32_t> in_frames(lengths.size());
        std::copy_n(lengths.data(), lengths.size(), in_frames.mutable_data());
        const int64_t total = add_frames(frame, ids.size(), in_frames.mutable_data(), in_frames.size());
        if (total < 0) throw py::value_error("lengths that are not those of the ids");
        auto [made, outside] = width == 2 ? framed_ids<uint16_t>(frame, ids, in_frames, total, counts)
                                          : framed_ids<int32_t>(frame, ids, in_frames, total, counts);
        return py::make_tuple(made, in_frames, outside);
      },
      py::arg("ids"), py::arg("lengths"), py::arg("bos"), py::arg("eod"), py::arg("width"),
      py::arg("counts").noconvert(),
      "data/framing.py's documents: uint16 or int32 ids, as `width` says, int32 lengths, and the first id outside of "
      "`counts` (uint32, added to), or -1.");

  py::class_<FillIn>(module, "FillIn", "data/fim.py's permutation of the pieces of a sample; pieces are not checked.")
      .def(py::init<uint64_t, uint64_t, bool, int64_t, int64_t, int64_t, std::optional<int64_t>, std::optional<int64_t>,
                    const std::array<uint32_t, 3>&>(),
           py::arg("rate"), py::arg("spm_rate"), py::arg("packed"), py::arg("prefix"), py::arg("middle"),
           py::arg("suffix"), py::arg("bos"), py::arg("eod"), py::arg("keys"))
      .def(
          "__call__",
          [](const FillIn& fill_in, uint64_t number, py::array tokens,
             const py::array_t<int64_t, py::array::c_style>& starts,
             const std::optional<py::array_t<bool, py::array::c_style>>& counts) {
            const auto permuted = [&](auto* ids) {
              return fill_in(number, ids, tokens.size(), starts.data(), starts.size(),
                             counts ? counts->data() : nullptr);
            };
            void* data = tokens.mutable_data();
            switch (tokens.itemsize()) {
              case 1: return permuted(static_cast<uint8_t*>(data));
              case 2: return permuted(static_cast<uint16_t*>(data));
              case 4: return permuted(static_cast<uint32_t*>(data));
              default: return permuted(static_cast<uint64_t*>(data));
            }
          },
          py::arg("number"), py::arg("tokens"), py::arg("starts"), py::arg("counts"),
          "Permute `tokens` (integers, written to) in place; whether any changed.");
}
