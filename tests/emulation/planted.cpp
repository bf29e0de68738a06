// The Python module of the kernel of gemm.cu.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "gemm.h"
#include "schedule.h"

namespace py = pybind11;
using fused_preact::planted::Bug;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// c [M, N] and the sum of it, of a [M, K] and b [K, N], both float16.
py::tuple multiply(Bug bug, const Array<uint16_t>& a, const Array<uint16_t>& b) {
  const auto M = a.shape(0), K = a.shape(1), N = b.shape(1);
  Array<float> c({M, N});
  std::vector<float> sums(M * N);
  unsigned arrived = 0;
  float total = 0;
  fused_preact::planted::gemm(bug, M, N, K, a.data(), b.data(), c.mutable_data(), sums.data(), &arrived, &total);
  return py::make_tuple(c, total);
}

}  // namespace

PYBIND11_MODULE(planted, m) {
  bind_schedule(m);
  py::enum_<Bug>(m, "Bug")
      .value("none", Bug::none)
      .value("no_barrier_after_wait", Bug::no_barrier_after_wait)
      .value("no_barrier_before_overwrite", Bug::no_barrier_before_overwrite)
      .value("weak_wait", Bug::weak_wait)
      .value("little_shared_memory", Bug::little_shared_memory)
      .value("divergent_barrier", Bug::divergent_barrier)
      .value("no_fence", Bug::no_fence)
      .value("first_block_sums_up", Bug::first_block_sums_up)
      .value("no_turn", Bug::no_turn);
  m.def("multiply", multiply);
  m.def("idle", fused_preact::planted::idle);
}
