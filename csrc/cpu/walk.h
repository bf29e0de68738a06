// A kernel call as the tiles that it walks over, so that two calls that read the same tensors can take turns on them.
#pragma once
#include "jobs.h"

namespace fused_preact::cpu::FUSED_PREACT_ISA {

// A prepared call: `tiles` in `groups`, each with sums of its own; where there are few groups, each in `splits` parts
// of its columns. start(g, part) comes before run(g, part, t) of its tiles, which come in order.
struct Walk {
  int64_t tiles, groups, splits;
  const void* call;
  void (*start)(const void* call, int64_t group, int64_t part);
  void (*run)(const void* call, int64_t group, int64_t part, int64_t tile);

  template <class Call>
  explicit Walk(const Call& prepared)
      : tiles(prepared.tiles()),
        groups(prepared.groups()),
        splits(prepared.splits()),
        call(&prepared),
        start([](const void* c, int64_t group, int64_t part) { static_cast<const Call*>(c)->start(group, part); }),
        run([](const void* c, int64_t group, int64_t part, int64_t tile) {
          static_cast<const Call*>(c)->run(group, part, tile);
        }) {}

  int64_t first_tile(int64_t group) const { return part_begin(tiles, groups, group); }
};

// What is to be done with a walk: a reference to a function.
class Walker {
 public:
  template <class Body>
  Walker(const Body& body)
      : body_(&body), call_([](const void* b, const Walk& walk) { (*static_cast<const Body*>(b))(walk); }) {}

  void operator()(const Walk& walk) const { call_(body_, walk); }

 private:
  const void* body_;
  void (*call_)(const void* body, const Walk& walk);
};

inline void walk_alone(const Walk& walk) {
  parallel(walk.groups * walk.splits, [&](int64_t job) {
    const int64_t g = job / walk.splits, part = job % walk.splits;
    walk.start(walk.call, g, part);
    for (int64_t t = walk.first_tile(g); t < walk.first_tile(g + 1); ++t) walk.run(walk.call, g, part, t);
  });
}

Kernel<decltype(Kernels::wgrad)> wgrad;
Kernel<decltype(Kernels::dgrad)> dgrad;

// wgrad and dgrad, prepared, handed to `walker` (dgrad: for each class of input pixels), and finished.
void prepare_wgrad(const Conv&, Dtype, const Gradient& dy, const Activation& x, const WeightGrad& dweight, void* dbias,
                   Workspace&, const Walker& walker);
void prepare_dgrad(const Conv&, Dtype, const Gradient& dy, const Weight&, const Activation& x, const void* add,
                   void* dz, const NormGrad& grad, Workspace&, const Walker& walker);

}  // namespace fused_preact::cpu::FUSED_PREACT_ISA
