// vocab_kl for torch: schemas, shapes, memory and autograd. The arithmetic is in rows.h (CPU) and
// kernels.cuh.
//
//     vocab_kl, vocab_kl_, linear_vocab_kl     what users call; they have gradients
//     kl_loss, kl_loss_grad[_], linear_kl, scale_, scatter_targets_       their parts; no gradients
//
// The gradient is made with the loss, while the row is at hand: V read and V written, where a forward and a
// backward would read V twice. backward() then only multiplies by what comes from above, and does not touch V
// if that is 1.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu.h"
#ifdef T2T_CUDA
#include <c10/cuda/CUDAGuard.h>

#include "launch.h"
#endif

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;
using In = const Tensor&;
using InMaybe = const MaybeTensor&;
using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

namespace t2t {
enum Reduction { NONE, MEAN, SUM };

// ----------------------------------------------------------------------------------------- shapes and memory
static at::TensorOptions accumulated(In x) {       // of losses, targets, weights: float64 for float64
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}
// For a gradient or logits. On a CPU the pages of fresh memory cost more than the loss: ask for large ones.
static Tensor fresh(at::IntArrayRef sizes, In like) {
  Tensor x = at::empty(sizes, like.options());
#ifdef __linux__
  const uintptr_t page = 1 << 21, begin = (uintptr_t)x.data_ptr(), first = (begin + page - 1) / page * page;
  const uintptr_t end = (begin + x.nbytes()) / page * page;
  if (x.is_cpu() && first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);        // a wish: may fail
#endif
  return x;
}
static Tensor losses(In x) { return at::empty_symint({x.sym_size(0)}, accumulated(x)); }
static Tensor no_tensor(In like) { return at::empty({0}, like.options()); }

static void check(In x, In indices, In probs) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_floating_point() && x.element_size() >= 2,
                    "logits: expected a matrix of float64, float32, bfloat16 or float16, got ",
                    x.sizes(), x.dtype());
  TORCH_CHECK_VALUE(x.size(1) > 0 && x.size(1) < INT32_MAX,
                    "logits: expected 1 to 2^31 - 2 columns, got ", x.size(1));
  TORCH_CHECK_VALUE(indices.dim() == 2 && indices.size(0) == x.size(0) && probs.sizes() == indices.sizes(),
                    "indices and probs: expected (", x.size(0), ", K), got ", indices.sizes(), " and ",
                    probs.sizes());
  TORCH_CHECK_VALUE(indices.scalar_type() == at::kInt || indices.scalar_type() == at::kLong,
                    "indices: expected int32 or int64, got ", indices.dtype());
  TORCH_CHECK_VALUE(probs.is_floating_point(), "probs: expected a floating-point type, got ", probs.dtype());
  TORCH_CHECK_VALUE(indices.device() == x.device() && probs.device() == x.device(),
                    "indices and probs: expected on ", x.device(), ", got ", indices.device(), " and ",
                    probs.device());
}

// (N,K), (N,K) -> sorted, each index once a row, as `merge` in t2t.py: for K so large that comparing pairs
// would hurt.
static Two merge(In indices, In probs) {
  auto [i, order] = indices.to(at::kLong).sort(1);
  Tensor p = probs.gather(1, order), changed = i.slice(1, 1).ne(i.slice(1, 0, -1));
  Tensor place = at::constant_pad_nd(changed, {1, 0}, 0).cumsum(1);        // distinct indices before this one
  return {at::full_like(i, -1).scatter_(1, place, i), at::zeros_like(p).scatter_add_(1, place, p)};
}

static void check_weight(In g, In x) {
  TORCH_CHECK_VALUE(g.dim() == 1 && (g.size(0) == 1 || g.size(0) == x.size(0)) && g.device() == x.device(),
                    "g: expected (1,) or (", x.size(0), ",) on ", x.device(), ", got ", g.sizes(), " on ",
                    g.device());
}

static Type type_of(In x) {
  auto t = x.scalar_type();
  return t == at::kDouble ? F64 : t == at::kFloat ? F32 : t == at::kBFloat16 ? BF16 : F16;
}

// One pass over the rows of x. dx: where the gradient goes (x itself, another, or none); g: (N,) or (1,).
// With `scatter`, x is not read, and dx += scatter * q.
static void run(In x, Tensor indices, Tensor probs, In g, In dx, In loss,
                const double* scatter = nullptr) {
  if (x.size(0) == 0 || (indices.size(1) == 0 && scatter)) return;
  auto pointer = [](In t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  Tensor weight = g.defined() ? g.to(accumulated(x)) : g;
  probs = probs.to(accumulated(x));
  bool merged = indices.size(1) > K_MERGED;
  if (merged) std::tie(indices, probs) = merge(indices, probs);
  indices = indices.contiguous(), probs = probs.contiguous();
  Rows j{type_of(x), x.size(0), x.size(1), indices.size(1),
         scatter ? nullptr : x.const_data_ptr(), pointer(dx), x.stride(0), dx.defined() ? dx.stride(0) : 0,
         indices.const_data_ptr(), indices.scalar_type() == at::kLong, merged,
         probs.const_data_ptr(), pointer(weight), g.defined() && g.numel() > 1 ? weight.stride(0) : 0,
         pointer(loss)};
  if (x.is_cpu()) return scatter ? scatter_cpu(j, *scatter) : rows_cpu(j);
#ifdef T2T_CUDA
  TORCH_CHECK_VALUE(j.type != F64 && (scatter || j.K <= K_CUDA), "on a GPU: expected float32, bfloat16 or "
                    "float16 and at most ", K_CUDA, " targets a row, got ", x.dtype(), " and ", j.K,
                    ": pass impl='torch'");
  c10::cuda::CUDAGuard guard(x.device());
  auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(scatter ? scatter_cuda(j, *scatter, stream) : rows_cuda(j, stream));
#else
  TORCH_CHECK(false, "t2t: this build of the extension has no CUDA: run python build_ext.py where nvcc is");
#endif
}

// Rows may be far apart, but the elements of a row must be neighbours.
static Tensor readable(In x) { return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous(); }
// May be written over: neighbours, and no two of them the same memory.
static bool own_rows(In x) {
  bool neighbours = x.sym_stride(1) == 1 || x.sym_size(1) == 1;
  return neighbours && (x.sym_size(0) < 2 || x.sym_stride(0) >= x.sym_size(1));
}
static void check_own_rows(const char* name, In x) {
  TORCH_CHECK_VALUE(own_rows(x), name, ": expected rows of their own to write over, got strides ",
                    x.strides());
}

// ----------------------------------------------------------------------------------- the parts, CPU and CUDA
Tensor kl_loss(In logits, In indices, In probs) {
  check(logits, indices, probs);
  Tensor x = readable(logits), loss = losses(x);
  run(x, indices, probs, {}, {}, loss);
  return loss;
}

Two kl_loss_grad(In logits, In indices, In probs, In g) {
  check(logits, indices, probs), check_weight(g, logits);
  Tensor x = readable(logits), loss = losses(x), dx = fresh(x.sizes(), x);
  run(x, indices, probs, g, dx, loss);
  return {loss, dx};
}

Tensor kl_loss_grad_(In logits, In indices, In probs, In g) {
  check(logits, indices, probs), check_weight(g, logits), check_own_rows("logits", logits);
  Tensor loss = losses(logits);
  run(logits, indices, probs, g, logits, loss);
  torch::autograd::impl::bump_version(logits);                 // autograd sees no stores: say so
  return loss;
}

void scale_(In x, In g) {               // x *= g, one number; if that is 1, x is not touched
  TORCH_CHECK_VALUE(g.numel() == 1 && g.device() == x.device(),
                    "g: expected one number on ", x.device(), ", got ", g.sizes());
  if (x.numel() == 0) return;
  Tensor a = g.to(accumulated(x));
#ifdef T2T_CUDA
  if (x.is_cuda() && x.is_contiguous()) {              // the kernel looks at g: the host does not wait for it
    c10::cuda::CUDAGuard guard(x.device());
    C10_CUDA_CHECK(scale_cuda(type_of(x), x.mutable_data_ptr(), x.numel(), a.const_data_ptr<float>(),
                              c10::cuda::getCurrentCUDAStream()));
    torch::autograd::impl::bump_version(x);
    return;
  }
#endif
  if (!x.is_cpu() || a.item().toDouble() != 1) x.mul_(a);
}

void scatter_targets_(In out, In indices, In probs, double alpha) {
  check(out, indices, probs);
  check_own_rows("out", out);
  run(out, indices, probs, {}, out, {}, &alpha);
  torch::autograd::impl::bump_version(out);
}

// Loss, and those of dh, dW, db that are wanted (the others come back empty), with the logits z a chunk of
// rows at a time. z and its gradient are one buffer, the same for every chunk. With a soft cap c, a second
// one: y = tanh(scale (h W^T + b) / c), z = c y.
Four linear_kl(In hidden, In weight, InMaybe bias, In indices,
               In probs, In g, double scale, std::optional<double> softcap, int64_t chunk,
               bool want_h, bool want_W, bool want_b) {
  TORCH_CHECK_VALUE(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) &&
                    hidden.dtype() == weight.dtype() && (!bias || bias->dtype() == weight.dtype()),
                    "hidden, weight and bias: expected (N,C), (V,C), (V,) of one type, got ", hidden.sizes(),
                    hidden.dtype(), " and ", weight.sizes(), weight.dtype());
  TORCH_CHECK_VALUE(!bias || bias->sizes() == weight.sizes().slice(0, 1),
                    "bias: expected (", weight.size(0), ",), got ", bias->sizes());
  TORCH_CHECK_VALUE(chunk > 0, "chunk: expected 1 or more, got ", chunk);
  check(hidden.new_empty({1, 1}).expand({hidden.size(0), weight.size(0)}), indices, probs);
  check_weight(g, hidden);
  int64_t N = hidden.size(0), V = weight.size(0), step = std::min(chunk, N);
  Tensor loss = losses(hidden), all_y = fresh({step, V}, hidden);
  bool learns = want_h || want_W || want_b;
  Tensor all_z = softcap && learns ? fresh({step, V}, hidden) : all_y;
  double s = scale / softcap.value_or(1);
  Tensor W = weight.t(), a = g.to(accumulated(hidden));
  Tensor dh = want_h ? at::empty(hidden.sizes(), hidden.options()) : no_tensor(hidden);
  // float32: bfloat16
  Tensor dW = want_W ? at::zeros(weight.sizes(), accumulated(weight)) : no_tensor(weight);
  Tensor db = want_b ? at::zeros({V}, accumulated(weight)) : no_tensor(weight);           // sums stop growing
  for (int64_t n = 0; n < N; n += step) {
    int64_t end = std::min(N, n + step);
    auto rows = [&](In t) { return t.slice(0, n, end); };
    Tensor h = rows(hidden), l = rows(loss), i = rows(indices), p = rows(probs);
    Tensor w = a.numel() > 1 ? rows(a) : a, y = all_y.narrow(0, 0, end - n), z = all_z.narrow(0, 0, end - n);
    at::addmm_out(y, bias.value_or(y), h, W, bias ? s : 0, s);                 // the product does the scaling
    if (softcap) at::mul_out(z, y.tanh_(), at::scalar_tensor(*softcap));
    if (!learns) {
      run(z, i, p, {}, {}, l);
      continue;
    }
    run(z, i, p, w * scale, z, l);
    if (softcap) at::tanh_backward_out(z, z, y);                               // z *= 1 - y^2
    if (want_h) { Tensor d = rows(dh); at::mm_out(d, z, weight); }
    if (want_W) weight.scalar_type() == dW.scalar_type() ? dW.addmm_(z.t(), h) : dW.add_(at::mm(z.t(), h));
    if (want_b) db.add_(z.sum(0, false, db.scalar_type()));
  }
  return {loss, dh, dW.to(weight.dtype()), db.to(weight.dtype())};
}

// -------------------------------------------------------------------- the parts, where there are only shapes
namespace meta {
Tensor kl_loss(In x, In, In) { return losses(x); }
Two kl_loss_grad(In x, In, In, In) { return {losses(x), at::empty_symint(x.sym_sizes(), x.options())}; }
Tensor kl_loss_grad_(In x, In, In, In) { return losses(x); }
void scale_(In, In) {}
void scatter_targets_(In, In, In, double) {}
Four linear_kl(In hidden, In weight, InMaybe, In, In, In, double, std::optional<double>, int64_t, bool want_h,
               bool want_W, bool want_b) {
  auto like = [](In t, bool want) {
    return want ? at::empty_symint(t.sym_sizes(), t.options()) : no_tensor(t);
  };
  return {losses(hidden), like(hidden, want_h), like(weight, want_W),
          want_b ? at::empty_symint({weight.sym_size(0)}, weight.options()) : no_tensor(weight)};
}
}  // namespace meta

// -------------------------------------------------------------------------------------------------- autograd
#define CALL(name) \
  c10::Dispatcher::singleton().findSchemaOrThrow("t2t::" #name, "").typed<decltype(name)>().call

// What the loss of a row is multiplied by, (1,): 1 over the number of rows with a target for a mean.
static Tensor weight_of(In x, In indices, In probs, int64_t reduction) {
  if (reduction != MEAN) return at::ones({1}, accumulated(x));
  Tensor valid = indices.ge(0).logical_and_(probs.gt(0)).any(1).sum();
  return valid.clamp_min_(1).to(accumulated(x)).reciprocal().unsqueeze(0);
}
static Tensor reduce(In loss, In weight, int64_t reduction) {
  return reduction == NONE ? loss : loss.sum() * weight.squeeze(0);
}
static void once() {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "vocab_kl: a gradient of the gradient is not supported by impl='ext': pass impl='torch'");
}

// A gradient for each row from above: the logits are kept, and loss and gradient made again.
struct PerRow : torch::autograd::Function<PerRow> {
  static Tensor forward(AutogradContext* ctx, In logits, In indices, In probs) {
    ctx->save_for_backward({logits, indices, probs});
    return CALL(kl_loss)(logits, indices, probs);
  }
  static variable_list backward(AutogradContext* ctx, variable_list g) {
    once();
    auto s = ctx->get_saved_variables();
    return {std::get<1>(CALL(kl_loss_grad)(s[0], s[1], s[2], g[0])), {}, {}};
  }
};

// One number from above: the gradient was made with the loss, fresh or over the logits.
struct Fused : torch::autograd::Function<Fused> {
  static Tensor forward(AutogradContext* ctx, In logits, In indices, In probs,
                        int64_t reduction, bool inplace) {
    Tensor weight = weight_of(logits, indices, probs, reduction), loss, dx;
    if (inplace) {
      loss = CALL(kl_loss_grad_)(logits, indices, probs, weight);
      dx = logits.detach();                                   // whoever changes it before backward() is told
    } else {
      std::tie(loss, dx) = CALL(kl_loss_grad)(logits, indices, probs, weight);
    }
    ctx->save_for_backward({dx});
    return reduce(loss, weight, reduction);
  }
  static variable_list backward(AutogradContext* ctx, variable_list g) {
    once();
    TORCH_CHECK(!ctx->saved_data.count("used"),
                "vocab_kl: a second backward through one loss is not supported by impl='ext': pass "
                "reduction='none', which keeps the logits, or impl='torch'");
    ctx->saved_data["used"] = true;
    Tensor dx = ctx->get_saved_variables()[0];
    CALL(scale_)(dx, g[0]);
    return {dx, {}, {}, {}, {}};
  }
};

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, In hidden, In weight, In indices,
                        In probs, InMaybe bias, int64_t reduction, double scale,
                        std::optional<double> softcap, int64_t chunk) {
    bool W = weight.requires_grad(), b = bias && bias->requires_grad();
    bool later = reduction == NONE && (W || b);     // rows of dh can be scaled afterwards, sums over rows not
    Tensor g = weight_of(hidden, indices, probs, reduction);
    auto [loss, dh, dW, db] = CALL(linear_kl)(hidden, weight, bias, indices, probs, g, scale, softcap, chunk,
                                              !later && hidden.requires_grad(), !later && W, !later && b);
    auto& d = ctx->saved_data;
    d["later"] = later, d["h"] = hidden.requires_grad(), d["W"] = W, d["b"] = b, d["scale"] = scale;
    d["softcap"] = softcap, d["chunk"] = chunk;
    if (later) ctx->save_for_backward({hidden, weight, indices, probs, bias.value_or(Tensor())});
    else ctx->save_for_backward({dh, dW, db});
    return reduce(loss, g, reduction);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    once();
    auto s = ctx->get_saved_variables();
    auto& d = ctx->saved_data;
    Tensor g = grads[0], dh, dW, db;
    bool h = d["h"].toBool(), W = d["W"].toBool(), b = d["b"].toBool();
    if (d["later"].toBool()) {
      MaybeTensor bias = s[4].defined() ? MaybeTensor(s[4]) : MaybeTensor();
      std::tie(std::ignore, dh, dW, db) = CALL(linear_kl)(
          s[0], s[1], bias, s[2], s[3], g, d["scale"].toDouble(), d["softcap"].toOptional<double>(),
          d["chunk"].toInt(), h, W, b);
    } else {
      auto times = [](In t, In g) { return (t * g).to(t.scalar_type()); };
      if (h) dh = times(s[0], g.dim() ? g.unsqueeze(1) : g);
      if (W) dW = times(s[1], g);
      if (b) db = times(s[2], g);
    }
    return {h ? dh : Tensor(), W ? dW : Tensor(), {}, {}, b ? db : Tensor(), {}, {}, {}, {}};
  }
};

static bool wanted(In t) { return at::GradMode::is_enabled() && t.requires_grad(); }

template <bool inplace> Tensor vocab_kl(In x, In i, In p, int64_t reduction) {
  if (!wanted(x)) return reduce(CALL(kl_loss)(x, i, p), weight_of(x, i, p, reduction), reduction);
  if (reduction == NONE) return PerRow::apply(x, i, p);
  return Fused::apply(x, i, p, reduction, inplace && own_rows(x));
}
Tensor linear_vocab_kl(In hidden, In weight, In indices, In probs,
                       InMaybe bias, int64_t reduction, double scale, std::optional<double> softcap,
                       int64_t chunk) {
  if (wanted(hidden) || wanted(weight) || (bias && wanted(*bias)))
    return Linear::apply(hidden, weight, indices, probs, bias, reduction, scale, softcap, chunk);
  Tensor g = weight_of(hidden, indices, probs, reduction);
  auto [loss, dh, dW, db] = CALL(linear_kl)(hidden, weight, bias, indices, probs, g, scale, softcap, chunk,
                                            false, false, false);
  return reduce(loss, g, reduction);
}

// Under autocast the head is applied as F.linear would: in the lower precision. The loss is in float32
// anyway.
template <c10::DispatchKey key, c10::DeviceType device>
Tensor linear_autocast(In hidden, In weight, In indices, In probs,
                       InMaybe bias, int64_t reduction, double scale, std::optional<double> softcap,
                       int64_t chunk) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKeySet{key});
  auto type = at::autocast::get_autocast_dtype(device);
  auto low = [&](In t) { return at::autocast::cached_cast(type, t, device); };
  return CALL(linear_vocab_kl)(low(hidden), low(weight), indices, probs,
                               bias ? MaybeTensor(low(*bias)) : bias, reduction, scale, softcap, chunk);
}

}  // namespace t2t

TORCH_LIBRARY(t2t, m) {                                       // reduction: 0 none, 1 mean, 2 sum
  m.def("vocab_kl(Tensor logits, Tensor indices, Tensor probs, int reduction=1) -> Tensor",
        t2t::vocab_kl<false>);
  m.def("vocab_kl_(Tensor(a!) logits, Tensor indices, Tensor probs, int reduction=1) -> Tensor",
        t2t::vocab_kl<true>);
  m.def("linear_vocab_kl(Tensor hidden, Tensor weight, Tensor indices, Tensor probs, Tensor? bias=None, "
        "int reduction=1, float scale=1, float? softcap=None, int chunk=1024) -> Tensor",
        t2t::linear_vocab_kl);
  m.def("kl_loss(Tensor logits, Tensor indices, Tensor probs) -> Tensor");
  m.def("kl_loss_grad(Tensor logits, Tensor indices, Tensor probs, Tensor g) -> (Tensor loss, Tensor dx)");
  m.def("kl_loss_grad_(Tensor(a!) logits, Tensor indices, Tensor probs, Tensor g) -> Tensor");
  m.def("linear_kl(Tensor hidden, Tensor weight, Tensor? bias, Tensor indices, Tensor probs, Tensor g, "
        "float scale, float? softcap, int chunk, bool want_h, bool want_W, bool want_b) "
        "-> (Tensor loss, Tensor dh, Tensor dW, Tensor db)");
  m.def("scale_(Tensor(a!) x, Tensor g) -> ()");
  m.def("scatter_targets_(Tensor(a!) out, Tensor indices, Tensor probs, float alpha=1) -> ()");
}

#define PARTS(m, of) \
  m.impl("kl_loss", of::kl_loss), m.impl("kl_loss_grad", of::kl_loss_grad); \
  m.impl("kl_loss_grad_", of::kl_loss_grad_), m.impl("linear_kl", of::linear_kl); \
  m.impl("scale_", of::scale_), m.impl("scatter_targets_", of::scatter_targets_)
TORCH_LIBRARY_IMPL(t2t, CPU, m) { PARTS(m, t2t); }
TORCH_LIBRARY_IMPL(t2t, Meta, m) { PARTS(m, t2t::meta); }
#ifdef T2T_CUDA
TORCH_LIBRARY_IMPL(t2t, CUDA, m) { PARTS(m, t2t); }
#endif
TORCH_LIBRARY_IMPL(t2t, Autograd, m) {                        // the parts say so if they are differentiated
  for (auto name : {"kl_loss", "kl_loss_grad", "kl_loss_grad_", "linear_kl", "scale_", "scatter_targets_"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}
TORCH_LIBRARY_IMPL(t2t, AutocastCPU, m) {
  m.impl("linear_vocab_kl", t2t::linear_autocast<c10::DispatchKey::AutocastCPU, c10::kCPU>);
}
TORCH_LIBRARY_IMPL(t2t, AutocastCUDA, m) {
  m.impl("linear_vocab_kl", t2t::linear_autocast<c10::DispatchKey::AutocastCUDA, c10::kCUDA>);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {                 // importing it registers the operations with torch
  m.def("isa", t2t::isa, "instruction set of the CPU kernel: portable, avx2 or avx512");
  m.def("use_isa", t2t::use_isa, "choose it, for tests; False if this machine has none of that name");
  m.def("exp", [](std::vector<float> x) { return t2t::exp_f32(x.data(), x.data(), x.size()), x; });
#ifdef T2T_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
