// megatron_lite._host: what is no tensor operation and too slow in Python. Needs neither torch nor a GPU.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/best_fit.h"
#include "host/draws.h"
#include "host/permutation.h"

namespace py = pybind11;
using megatron_lite::Permutation;

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
}
