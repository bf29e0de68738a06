// set_schedule(threads, blocks, copies, seed, multiprocessors) for a Python module. The types are each module's own,
// since a process may load two such modules, and each has an emulation of its own.
#pragma once
#include <pybind11/pybind11.h>

#include "emulation.h"

inline void bind_schedule(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace fused_preact::emulation;
  py::register_local_exception<Error>(m, "EmulationError", PyExc_RuntimeError);
  py::enum_<Order>(m, "Order", py::module_local())
      .value("forward", Order::forward)
      .value("reverse", Order::reverse)
      .value("random", Order::random)
      .value("greedy", Order::greedy);
  py::enum_<Copies>(m, "Copies", py::module_local()).value("lazy", Copies::lazy).value("eager", Copies::eager);
  m.def("set_schedule", [](Order threads, Order blocks, Copies copies, uint64_t seed, int multiprocessors) {
    set_schedule({threads, blocks, copies, seed, multiprocessors});
  });
}
