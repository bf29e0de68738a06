#include "running.h"

#include <algorithm>

#include "launch.h"

namespace fused_preact {

namespace {

void expect_count(const Item& name, const Tensor& count) {
  expect(count.scalar_type() == ScalarType::Long && count.numel() == 1, name, ": expected one int64, got ",
         torch::headeronly::toString(count.scalar_type()), " of shape ", text(count.sizes()));
}

void expect_rows(const Item& name, const Tensor& rows) {
  const ScalarType type = rows.scalar_type();
  expect(rows.dim() == 2 && rows.size(0) == kNormRows && rows.is_contiguous() &&
             (type == ScalarType::Float || type == ScalarType::Double),
         name, ": expected contiguous float32 or float64 of shape [", kNormRows, ", C], got ",
         torch::headeronly::toString(type), " of shape ", text(rows.sizes()));
}

// One for each batch norm or count, whichever are more.
std::vector<Running> parse(const Tensors& mean, const Tensors& var, const Tensors& counts, const Tensors& rows,
                           const Sizes& units) {
  std::vector<Running> norms(std::max(units.size(), counts.size()));
  for (size_t i = 0; i < counts.size(); ++i) {
    expect_count(item("counts", i), counts[i]);
    norms[i].count = static_cast<int64_t*>(counts[i].mutable_data_ptr());
  }
  for (size_t i = 0; i < units.size(); ++i) {
    expect(units[i] >= 0 && static_cast<size_t>(units[i]) < rows.size(), "units: expected from 0 to below ",
           rows.size(), ", got ", units[i]);
    const Tensor& batch = rows[units[i]];
    expect_rows(item("rows", units[i]), batch);
    const int64_t C = batch.size(1);
    expect_parameter(item("mean", i), mean[i], {C});
    expect_parameter(item("var", i), var[i], {C});
    norms[i] = {mean[i].mutable_data_ptr(),
                var[i].mutable_data_ptr(),
                mean[i].stride(0),
                var[i].stride(0),
                batch.const_data_ptr(),
                norms[i].count,
                static_cast<int32_t>(C),
                kernel_dtype(mean[i].scalar_type()),
                kernel_dtype(var[i].scalar_type()),
                kernel_dtype(batch.scalar_type())};
  }
  return norms;
}

}  // namespace

void update_running(const Tensors& mean, const Tensors& var, const Tensors& counts, const Tensors& rows,
                    const Sizes& units, std::optional<double> momentum) {
  expect_tensors("mean", mean, units.size());
  expect_tensors("var", var, units.size());
  if (mean.empty() && counts.empty()) return;
  const Tensor& any = mean.empty() ? counts[0] : mean[0];
  SameDevice{any, mean.empty() ? "counts" : "mean"}("mean", mean)("var", var)("counts", counts)("rows", rows);
  expect(momentum || units.size() <= 1, "momentum: expected a number for ", units.size(), " batch norms, got None");
  // What is refused leaves everything as it was: nothing is written up to here.
  const std::vector<Running> norms = parse(mean, var, counts, rows, units);
  const Device device = device_of(any);
  device.kernels.move(norms.data(), norms.size(), momentum ? &*momentum : nullptr, Scope(*device.scratch));
}

}  // namespace fused_preact
