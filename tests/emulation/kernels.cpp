// The Python module of the table of csrc/cuda: its functions on the addresses of their arguments.
#include "../../csrc/cuda/kernels.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "schedule.h"

namespace py = pybind11;
using namespace fused_preact;

namespace {

// Filled with NaN; a guard zone behind each piece must be the same at the end.
class NanWorkspace final : public Workspace {
 public:
  NanWorkspace() : zeros_(kCounters) {}

  uint32_t* counters() override { return zeros_.data(); }

  void* take(size_t bytes) override {
    const size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    pieces_.push_back(
        {Memory(static_cast<std::byte*>(std::aligned_alloc(kAlignment, whole + kGuard)), std::free), bytes});
    std::fill_n(pieces_.back().memory.get(), whole + kGuard, kNan);
    return pieces_.back().memory.get();
  }

  void check() const {
    for (const auto& [memory, bytes] : pieces_)
      if (std::any_of(memory.get() + bytes, memory.get() + bytes + kGuard, [](std::byte b) { return b != kNan; }))
        throw emulation::Error("a kernel wrote past the end of " + std::to_string(bytes) + " bytes of workspace");
    if (std::any_of(zeros_.begin(), zeros_.end(), [](uint32_t counter) { return counter != 0; }))
      throw emulation::Error("a kernel left a counter that is not zero");
  }

 private:
  static constexpr size_t kAlignment = 64, kGuard = 1024;
  static constexpr std::byte kNan{0xff};
  using Memory = std::unique_ptr<std::byte[], decltype(&std::free)>;
  struct Piece {
    Memory memory;
    size_t bytes;
  };
  std::vector<Piece> pieces_;
  std::vector<uint32_t> zeros_;
};

// Arguments by position: numbers as they are, pointers and structs as addresses.
class Arguments {
 public:
  explicit Arguments(const std::vector<uintptr_t>& values) : values_(values) {}

  template <class T>
  const T& object(size_t i) const {
    return *static_cast<const T*>(pointer(i));
  }
  void* pointer(size_t i) const { return reinterpret_cast<void*>(values_.at(i)); }
  int64_t number(size_t i) const { return static_cast<int64_t>(values_.at(i)); }
  Dtype dtype(size_t i) const { return static_cast<Dtype>(number(i)); }

 private:
  const std::vector<uintptr_t>& values_;
};

void call(const std::string& name, const std::vector<uintptr_t>& values) {
  const Kernels& table = cuda::kernels();
  const Arguments a(values);
  NanWorkspace workspace;
  if (name == "forward")
    table.forward(a.object<Conv>(0), a.dtype(1), a.object<Activation>(2), a.object<Weight>(3), a.pointer(4),
                  a.pointer(5), a.pointer(6), a.object<Affine>(7), a.pointer(8), workspace);
  else if (name == "dgrad")
    table.dgrad(a.object<Conv>(0), a.dtype(1), a.object<Gradient>(2), a.object<Weight>(3), a.object<Activation>(4),
                a.pointer(5), a.pointer(6), a.object<NormGrad>(7), workspace);
  else if (name == "wgrad")
    table.wgrad(a.object<Conv>(0), a.dtype(1), a.object<Gradient>(2), a.object<Activation>(3), a.object<WeightGrad>(4),
                a.pointer(5), workspace);
  else if (name == "gradients")
    table.gradients(a.object<Conv>(0), a.dtype(1), a.object<Gradient>(2), a.object<Weight>(3), a.object<Activation>(4),
                    a.pointer(5), a.pointer(6), a.object<NormGrad>(7), a.object<WeightGrad>(8), a.pointer(9),
                    workspace);
  else if (name == "statistics")
    table.statistics(a.dtype(0), a.number(1), a.number(2), a.pointer(3), a.object<Affine>(4), a.pointer(5), workspace);
  else if (name == "running")
    table.running(a.dtype(0), a.number(1), a.pointer(2), a.pointer(3), a.object<Affine>(4), a.pointer(5), workspace);
  else if (name == "dx")
    table.dx(a.dtype(0), a.number(1), a.number(2), a.object<Gradient>(3), a.pointer(4), a.pointer(5), workspace);
  else if (name == "convert")
    table.convert(a.dtype(0), a.dtype(1), static_cast<const Conversion*>(a.pointer(2)), a.number(3), workspace);
  else if (name == "join")
    table.join(a.dtype(0), a.number(1), a.number(2), a.pointer(3), a.object<Gradient>(4), a.number(5) != 0,
               a.pointer(6), a.pointer(7), a.object<Affine>(8), a.pointer(9), workspace);
  else if (name == "activate")
    table.activate(a.dtype(0), a.number(1), a.number(2), a.object<Activation>(3), a.pointer(4), workspace);
  else if (name == "activate_backward")
    table.activate_backward(a.dtype(0), a.number(1), a.number(2), a.pointer(3), a.object<Activation>(4), a.pointer(5),
                            a.object<NormGrad>(6), workspace);
  else if (name == "move")
    table.move(static_cast<const Running*>(a.pointer(0)), a.number(1), static_cast<const double*>(a.pointer(2)),
               workspace);
  else
    throw std::invalid_argument("no kernel of the name " + name);
  workspace.check();
}

}  // namespace

PYBIND11_MODULE(kernels, m) {
  bind_schedule(m);
  m.def("call", call);
  m.def("latest_shared", emulation::latest_shared);
  m.def("latest_copies", emulation::latest_copies);
}
