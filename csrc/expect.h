// What the operators expect of their arguments: each ends in an error that names the argument, what was expected and
// what came. Messages are put together only where they are needed: a net passes here a thousand times a step.
#pragma once
#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "tensors.h"

namespace fused_preact {

using Sizes = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

template <class... Parts>
void expect(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Sizes as they are printed.
template <class Range>
struct Text {
  const Range& sizes;
};

template <class Range>
std::ostream& operator<<(std::ostream& out, const Text<Range>& text) {
  out << '[';
  for (size_t i = 0; i < text.sizes.size(); ++i) out << (i == 0 ? "" : ", ") << text.sizes[i];
  return out << ']';
}

template <class Range>
Text<Range> text(const Range& sizes) {
  return {sizes};
}

template <class Name>
void expect_tensor(const Name& name, const Tensor& x, ScalarType type, const Sizes& sizes) {
  const auto got = x.sizes();
  const bool fits = x.scalar_type() == type && std::equal(got.begin(), got.end(), sizes.begin(), sizes.end());
  expect(fits, name, ": expected ", torch::headeronly::toString(type), " of shape ", text(sizes), ", got ",
         torch::headeronly::toString(x.scalar_type()), " of shape ", text(got));
}

// The name of one tensor of a list, as it is printed.
struct Item {
  const char* name;
  size_t index;
};

inline Item item(const char* name, size_t index) { return {name, index}; }

inline std::ostream& operator<<(std::ostream& out, const Item& i) { return out << i.name << '[' << i.index << ']'; }

inline void expect_tensors(const char* name, const Tensors& tensors, size_t n) {
  expect(tensors.size() == n, name, ": expected ", n, " tensors, got ", tensors.size());
}

// A device as torch writes it; of those that have no kernels here, that it is another.
struct Place {
  bool cpu, cuda;
  int32_t index;

  explicit Place(const Tensor& x) : cpu(x.is_cpu()), cuda(x.is_cuda()), index(x.get_device_index()) {}

  bool operator==(const Place& other) const {
    return (cpu || cuda) && cpu == other.cpu && cuda == other.cuda && index == other.index;
  }
};

inline std::ostream& operator<<(std::ostream& out, const Place& place) {
  if (place.cuda) return out << "cuda:" << place.index;
  return out << (place.cpu ? "cpu" : "another device");
}

// Every tensor of a call is on the device of x, an argument of the name `of`.
class SameDevice {
 public:
  explicit SameDevice(const Tensor& x, const char* of = "x") : of_(of), place_(x) {}

  const SameDevice& operator()(const char* name, const Tensor& tensor) const {
    const Place place(tensor);
    expect(place == place_, name, ": expected on ", place_, " as ", of_, ", got ", place);
    return *this;
  }
  const SameDevice& operator()(const char* name, const std::optional<Tensor>& tensor) const {
    return tensor ? (*this)(name, *tensor) : *this;
  }
  const SameDevice& operator()(const char* name, const Tensors& tensors) const {
    for (const Tensor& tensor : tensors) (*this)(name, tensor);
    return *this;
  }

 private:
  const char* of_;
  Place place_;
};

// A parameter of any floating-point type, which is converted to that of the stage.
template <class Name>
void expect_parameter(const Name& name, const Tensor& x, const Sizes& sizes) {
  const ScalarType type = x.scalar_type();
  const bool floating = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
                        type == ScalarType::Double;
  expect_tensor(name, x, floating ? type : ScalarType::Float, sizes);
}

}  // namespace fused_preact
