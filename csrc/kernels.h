// What a device supplies: kernels behind one table, on raw pointers.
//
// The schedule (schedule.h) is written against this table and knows no device; cpu/ and cuda/ fill it
// in. No torch header is seen here or in a kernel.
//
// Layout. Every activation is dense NHWC in one storage type; every per-channel row is in the
// accumulation type: double for f64, float for the rest. Pointers are void because one table serves all
// types. No pointer may alias an output, except where a parameter says so.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace fused_preact {

// Storage types, and how float32 is multiplied: tf32 is stored as f32, with products of ten bits of mantissa.
enum class Dtype { f32, bf16, f16, f64, tf32 };

// A convolution: x [N,H,W,C], y [N,P,Q,K], weight [K,C,R,S], zero padding, groups = dilation = 1.
struct Conv {
  int64_t N, H, W, C, P, Q, K, R, S;
  int64_t stride_h, stride_w, pad_h, pad_w;
};

// weight[k][c][r][s] at data[k*stride_k + c*stride_c + r*stride_r + s*stride_s], in the storage type.
template <class Pointer>
struct Filter {
  Pointer data;
  int64_t stride_k, stride_c, stride_r, stride_s;
};
using Weight = Filter<const void*>;
using WeightGrad = Filter<void*>;

// The per-channel rows of one batch norm, consecutive in one [5][C] array that forward keeps for backward:
//   z = scale*(x - mean) + shift,  scale = gamma*rstd,  shift = beta + scale*lost;  variance is the unbiased one.
// Subtracting the mean first keeps the digits of channels whose mean is large against their deviation; lost is the mean
// in the row minus that before it was rounded, which would move all of such a channel.
enum NormRow { kMean, kRstd, kVariance, kScale, kShift, kNormRows };

// The rows by which backward forms dx behind one batch norm of batch statistics, consecutive in one [2][C] array:
//   dx = scale*dz + slope*(x - mean) + offset,  slope = -scale*rstd*dgamma/m,  offset = -scale*dbeta/m.
enum GradRow { kSlope, kOffset, kGradRows };

// a = max(z, 0) of x; a = x where norm is null.
struct Activation {
  const void* x;
  const void* norm;  // [kNormRows][C] or null
};

// dy of a convolution: g itself where norm is null; else g is dz of the batch norm behind it, of input x, and
//   dy = scale*g + slope*(x - mean) + offset,  or scale*g where grad is null (running statistics).
struct Gradient {
  const void* g;
  const void* x;
  const void* norm;  // [kNormRows][K] or null
  const void* grad;  // [kGradRows][K] or null
};

// What backward makes of one batch norm: dgamma = sum dz*xhat and dbeta = sum dz, [C] each, and the rows above.
struct NormGrad {
  void* dgamma;
  void* dbeta;
  void* rows;  // [kGradRows][C], or null where the batch norm used running statistics
};

// What turns the moments of a tensor into the rows of the batch norm that reads it.
struct Affine {
  const void* gamma;  // [C], accumulation type
  const void* beta;
  double eps;
};

// `count` values, dense, and where they go in another storage type.
struct Conversion {
  const void* from;
  void* to;
  int64_t count;
};

// The running statistics of one batch norm, whose values are `step` apart, and the batch's that they move towards. No
// buffer is in two of a call.
struct Running {
  void *mean, *variance;             // [C], or both null
  int64_t mean_step, variance_step;  // values
  const void* rows;                  // [kNormRows][C] of f32 or f64
  int64_t* count;                    // of batches, or null
  int32_t C;
  Dtype mean_type, variance_type, rows_type;
};

constexpr int kCounters = 4096;

// What one kernel call may use.
struct Workspace {
  // Scratch memory: 64-byte aligned, uninitialised, valid until the work of the call is done.
  virtual void* take(size_t bytes) = 0;

  // On devices that have a queue kCounters of them, zero before and after the work of each call.
  virtual uint32_t* counters() = 0;

  void* stream = nullptr;  // where the work is queued there

 protected:
  ~Workspace() = default;
};

struct Kernels {
  // y = conv(a, weight) + bias + residual. Where next_rows is not null, also the rows [kNormRows][K] of the
  // batch norm `next` that reads y, from the batch statistics of y as stored.
  void (*forward)(const Conv&, Dtype, const Activation& x, const Weight&, const void* bias, const void* residual,
                  void* y, const Affine& next, void* next_rows, Workspace&);

  // dz = (conv_transpose(dy, weight) + add) * [z > 0] with z of x, and the gradients of its batch norm. Where x.norm is
  // null: plain, no mask, grad unused. add may be null.
  void (*dgrad)(const Conv&, Dtype, const Gradient& dy, const Weight&, const Activation& x, const void* add, void* dz,
                const NormGrad& grad, Workspace&);

  // dweight[k,c,r,s] = sum over pixels of a * dy; dbias[k] = sum of dy where not null (storage type, both).
  void (*wgrad)(const Conv&, Dtype, const Gradient& dy, const Activation& x, const WeightGrad& dweight, void* dbias,
                Workspace&);

  // Rows of the batch norm `next` that reads x, from the batch statistics of x [pixels][C].
  void (*statistics)(Dtype, int64_t pixels, int64_t C, const void* x, const Affine& next, void* rows, Workspace&);

  // Rows of a batch norm that uses given (running) statistics [C], accumulation type.
  void (*running)(Dtype, int64_t C, const void* mean, const void* variance, const Affine& next, void* rows, Workspace&);

  // dx = dy + add, dy as above over [pixels][C]; add may be null; dx may be dy.g.
  void (*dx)(Dtype, int64_t pixels, int64_t C, const Gradient& dy, const void* add, void* dx, Workspace&);

  // dgrad and wgrad in one call. On the CPU to the same bits; on a GPU sums over pixels may be cut into other parts.
  void (*gradients)(const Conv&, Dtype, const Gradient& dy, const Weight&, const Activation& x, const void* add,
                    void* dz, const NormGrad& grad, const WeightGrad& dweight, void* dbias, Workspace&);

  // All of the tensors, none of them empty, from one to another of f32, bf16 and, where the device computes in it, f16.
  void (*convert)(Dtype from, Dtype to, const Conversion* tensors, int64_t count, Workspace&);

  // to[n][j][i] = from[n][i][j] for N matrices [rows][columns] of values of two, four or eight bytes: what makes NHWC
  // of NCHW and back. Null where torch does it as well.
  void (*permute)(int64_t value_bytes, int64_t N, int64_t rows, int64_t columns, const void* from, void* to,
                  Workspace&);

  // joined = stream + branch, or minus it, in f32 over [pixels][C]: branches of 16 bits on a stream that stays in f32.
  // The branch is formed as dy above. narrowed, which may be null, is the same rounded to the storage type. Where
  // next_rows is not null, also the rows of `next` from the statistics of narrowed: then narrowed is not null, and the
  // branch has no norm.
  void (*join)(Dtype, int64_t pixels, int64_t C, const void* stream, const Gradient& branch, bool subtract,
               void* joined, void* narrowed, const Affine& next, void* next_rows, Workspace&);

  // What nn.BatchNorm2d does in training: adds one to each count, and moves mean and variance by `momentum` towards the
  // batch's; where momentum is null, by one over their count, or not at all.
  void (*move)(const Running* norms, int64_t count, const double* momentum, Workspace&);

  // What forward and backward are without a product, for convolutions that are another library's. a of x over
  // [pixels][C], x with a norm; and from da the gradients of the batch norm, and dx of x: dgrad's without its product,
  // then that of dx. dx may be da.
  void (*activate)(Dtype, int64_t pixels, int64_t C, const Activation& x, void* a, Workspace&);
  void (*activate_backward)(Dtype, int64_t pixels, int64_t C, const void* da, const Activation& x, void* dx,
                            const NormGrad& grad, Workspace&);
};

// The type of the functions of which a table's field is one: Kernel<decltype(Kernels::dx)> dx; declares one.
template <class Field>
using Kernel = std::remove_pointer_t<Field>;

}  // namespace fused_preact
