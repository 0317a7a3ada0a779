// The only file that knows torch. Every op of a model is bound twice: as torch.ops.atom_cpu.* (for torch.compile), and
// as a plain C function of this extension module, which costs a third of the dispatcher's time. A call that the kernels
// don't support returns NotImplemented there, and raises in torch.ops. Sampling is never compiled: it is bound once.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <cerrno>

#include "arena.h"
#include "kernels.h"
#include "memory.h"
#include "tape.h"
#include "team.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using atom::DType;

bool dtype_of(const Tensor& t, DType& type) {
  switch (t.scalar_type()) {
    case at::kFloat: type = DType::f32; return true;
    case at::kBFloat16: type = DType::bf16; return true;
    case at::kHalf: type = DType::f16; return true;
    default: return false;
  }
}

// Where this thread's calls are written down, if anywhere.
struct Recording {
  std::shared_ptr<atom_memory::Arena> arena;  // of all that the calls leave behind for one another
  std::shared_ptr<atom::Tape> tape;
};
thread_local std::unique_ptr<Recording> recording;

template <class Args>
void perform(const Args& args) {
  if (recording) recording->tape->add(args);
  atom::run(args, at::get_num_threads());
}

Tensor empty(at::IntArrayRef shape, at::ScalarType type) {
  if (recording) return recording->arena->tensor(shape, type);
  return at::detail::empty_cpu(shape, type, /*pin_memory=*/false, std::nullopt);
}

// Rows of a tensor seen as [rows, last dim]; false unless one stride leads from row to row.
bool rows_of(const Tensor& x, int64_t& rows, int64_t& stride) {
  const int64_t dims = x.dim();
  if (dims == 0 || (x.stride(-1) != 1 && x.size(-1) != 1)) return false;
  rows = 1;
  stride = x.size(-1);
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (rows == 1) stride = x.stride(d);
    else if (x.stride(d) != rows * stride) return false;
    rows *= x.size(d);
  }
  return true;
}

Tensor with_rows(Tensor x, int64_t& rows, int64_t& stride) {
  if (!rows_of(x, rows, stride)) {
    x = x.contiguous();
    rows_of(x, rows, stride);
  }
  return x;
}

Tensor output_like(const Tensor& x, int64_t last, at::ScalarType type) {
  if (x.dim() == 2) return empty({x.size(0), last}, type);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return empty(shape, type);
}

// ---- ops: false = not supported ----

bool pack_weight(const Tensor& weight, bool paired, Tensor& packed) {
  DType type;
  if (weight.dim() != 2 || !dtype_of(weight, type) || (paired && weight.size(0) % 2)) return false;
  const Tensor w = weight.stride(1) == 1 ? weight : weight.contiguous();
  const int64_t panels = atom::num_panels(w.size(0), paired), steps = atom::ksteps(type, w.size(1));
  packed = atom_memory::allocate({panels, steps, atom::kPanel, atom::kwidth(type)}, w.scalar_type());
  atom::pack_weight(type, w.const_data_ptr(), w.size(0), w.size(1), w.stride(0), paired, packed.data_ptr(),
                    at::get_num_threads());
  return true;
}

// All but the output; x is x_in, in rows.
bool linear_args(const Tensor& x_in, const Tensor& packed, const Tensor* bias, int64_t n, bool paired, Tensor& x,
                 atom::LinearArgs& args) {
  if (packed.dim() != 4 || x_in.dim() < 1 || !dtype_of(x_in, args.type)) return false;
  x = with_rows(x_in, args.m, args.ldx);
  args.k = x.size(-1);
  TORCH_CHECK(packed.scalar_type() == x.scalar_type() && packed.size(1) == atom::ksteps(args.type, args.k) &&
                  packed.size(0) == atom::num_panels(paired ? 2 * n : n, paired),
              "linear: x ", x.sizes(), " ", x.scalar_type(), " and ", n, " outputs don't fit a weight packed as ",
              packed.sizes(), " ", packed.scalar_type());
  args.bias = nullptr;
  if (bias) {
    if (!dtype_of(*bias, args.bias_type) || bias->dim() != 1 || bias->size(0) != n || bias->stride(0) != 1)
      return false;
    args.bias = bias->const_data_ptr();
  }
  args.n = n;
  args.x = x.const_data_ptr();
  args.packed = packed.const_data_ptr();
  args.paired = paired;
  return true;
}

bool linear(const Tensor& x_in, const Tensor& packed, const Tensor* bias, int64_t n, bool out_float32, bool paired,
            Tensor& out, const atom::RowNorm& norm = {}) {
  atom::LinearArgs args;
  Tensor x;
  if (!linear_args(x_in, packed, bias, n, paired, x, args)) return false;
  args.norm = norm;
  args.out_type = out_float32 ? DType::f32 : args.type;
  out = output_like(x, n, out_float32 ? at::kFloat : x.scalar_type());
  args.out = out.data_ptr();
  perform(args);
  return true;
}

// The same of rms_norm(x), or of rms_norm(x + residual), which the residual becomes.
bool norm_linear(const Tensor& x_in, const Tensor* residual, const Tensor& weight, double eps, const Tensor& packed,
                 const Tensor* bias, int64_t n, bool paired, Tensor& out) {
  if (x_in.dim() < 1 || weight.scalar_type() != x_in.scalar_type() || weight.dim() != 1 || weight.stride(0) != 1 ||
      weight.size(0) != x_in.size(-1))
    return false;
  atom::RowNorm norm{weight.const_data_ptr(), float(eps)};
  if (residual) {
    int64_t rows;
    if (residual->scalar_type() != x_in.scalar_type() || residual->sizes() != x_in.sizes() ||
        !rows_of(*residual, rows, norm.ldr))
      return false;
    norm.residual = residual->data_ptr();
  }
  return linear(x_in, packed, bias, n, false, paired, out, norm);
}

// Not part of a recorded step, whose results are float.
bool linear_argmax(const Tensor& x_in, const Tensor& packed, int64_t n, Tensor& out) {
  atom::LinearArgs args;
  Tensor x;
  if (n < 1 || x_in.dim() != 2 || !linear_args(x_in, packed, nullptr, n, false, x, args)) return false;
  args.out_type = DType::f32;
  out = empty({args.m}, at::kLong);
  atom::linear_argmax(args, out.data_ptr<int64_t>(), at::get_num_threads());
  return true;
}

// Rows of a table at ids, which must be within it.
bool embedding(const Tensor& ids, const Tensor& table, Tensor& out) {
  if (table.dim() != 2 || table.stride(1) != 1 || ids.dim() != 1 || ids.scalar_type() != at::kLong ||
      !ids.is_contiguous())
    return false;
  atom::TakeArgs args;
  args.ids = ids.const_data_ptr<int64_t>();
  args.count = ids.size(0);
  args.rows = table.size(0);
  const int64_t wrong = atom::outside(args);
  TORCH_CHECK_INDEX(wrong < 0, "embedding: id ", args.ids[wrong], " of ", args.rows, " rows");
  args.table = table.const_data_ptr();
  args.row_bytes = table.size(1) * table.element_size();
  args.stride_bytes = table.stride(0) * table.element_size();
  out = empty({args.count, table.size(1)}, table.scalar_type());
  args.out = out.data_ptr();
  perform(args);
  return true;
}

// With a residual, total = x + residual. `in_place`: total is the residual, and the norm replaces x.
bool norm(const Tensor& x_in, const Tensor* residual, const Tensor& weight, double eps, bool in_place, Tensor& out,
          Tensor* total) {
  atom::NormArgs args;
  if (!dtype_of(x_in, args.type) || weight.scalar_type() != x_in.scalar_type() || weight.dim() != 1 ||
      weight.stride(0) != 1 || x_in.dim() < 1 || weight.size(0) != x_in.size(-1))
    return false;
  const bool grouped = !in_place && x_in.dim() == 3 && x_in.stride(2) == 1 && x_in.numel();
  Tensor x = x_in;
  if (grouped) {
    args.rows = x.size(0) * x.size(1);
    args.group = x.size(1);
    args.ldx = x.stride(1);
    args.ldg = x.stride(0);
  } else {
    x = with_rows(x_in, args.rows, args.ldx);
    args.group = std::max<int64_t>(1, args.rows);
    args.ldg = 0;
  }
  args.cols = x.size(-1);
  args.x = x.const_data_ptr();
  args.residual = nullptr;
  if (residual) {
    int64_t rows;
    if (residual->scalar_type() != x.scalar_type() || residual->sizes() != x.sizes() ||
        !rows_of(*residual, rows, args.ldr))
      return false;
    args.residual = residual->const_data_ptr();
    *total = in_place ? *residual : output_like(x, args.cols, x.scalar_type());
    args.total = total->data_ptr();
    args.ldt = in_place ? args.ldr : args.cols;
  }
  args.weight = weight.const_data_ptr();
  args.eps = float(eps);
  out = in_place ? x : output_like(x, args.cols, x.scalar_type());
  args.out = out.data_ptr();
  args.ldo = in_place ? args.ldx : args.cols;
  perform(args);
  return true;
}

bool silu_and_mul(const Tensor& x_in, Tensor& out) {
  atom::SiluArgs args;
  if (!dtype_of(x_in, args.type) || x_in.dim() < 1 || x_in.size(-1) % 2) return false;
  const Tensor x = with_rows(x_in, args.rows, args.ldx);
  args.half = x.size(-1) / 2;
  args.x = x.const_data_ptr();
  out = output_like(x, args.half, x.scalar_type());
  args.out = out.data_ptr();
  perform(args);
  return true;
}

bool rotary(const Tensor& positions, const Tensor& query, const Tensor& key, const Tensor& cos_sin, bool interleaved) {
  atom::RotaryArgs args;
  if (!dtype_of(query, args.type) || key.scalar_type() != query.scalar_type() || query.dim() != 3 || key.dim() != 3 ||
      query.stride(2) != 1 || key.stride(2) != 1 || positions.scalar_type() != at::kLong ||
      !positions.is_contiguous() || cos_sin.scalar_type() != at::kFloat || !cos_sin.is_contiguous() ||
      cos_sin.size(1) % 2 || cos_sin.size(1) > query.size(2))
    return false;
  args.tokens = query.size(0);
  args.rotary_dim = cos_sin.size(1);
  args.interleaved = interleaved;
  args.positions = positions.const_data_ptr<int64_t>();
  args.cos_sin = cos_sin.const_data_ptr<float>();
  const Tensor* both[] = {&query, &key};
  for (int i = 0; i < 2; ++i) {
    args.x[i] = both[i]->data_ptr();
    args.heads[i] = both[i]->size(1);
    args.token_stride[i] = both[i]->stride(0);
    args.head_stride[i] = both[i]->stride(1);
  }
  perform(args);
  return true;
}

bool cache_of(const Tensor& data, const Tensor* scale, DType type, atom::Cache& cache) {
  if (data.dim() != 4 || data.stride(3) != 1) return false;
  if (data.scalar_type() == at::kFloat8_e4m3fn) {
    if (!scale || scale->scalar_type() != at::kFloat || scale->dim() != 3) return false;
    cache.type = DType::f8e4m3;
    cache.scale = scale->data_ptr<float>();
    cache.scale_block_stride = scale->stride(0);
    cache.scale_slot_stride = scale->stride(1);
    cache.scale_head_stride = scale->stride(2);
  } else {
    if (scale || !dtype_of(data, cache.type) || cache.type != type) return false;
    cache.scale = nullptr;
  }
  cache.data = data.data_ptr();
  cache.block_stride = data.stride(0);
  cache.slot_stride = data.stride(1);
  cache.head_stride = data.stride(2);
  return true;
}

bool store_kv(const Tensor& key, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& slots, const Tensor* k_scale, const Tensor* v_scale) {
  atom::StoreArgs args;
  if (!dtype_of(key, args.type) || value.scalar_type() != key.scalar_type() || key.dim() != 3 ||
      value.sizes() != key.sizes() || key.stride(2) != 1 || value.stride(2) != 1 ||
      slots.scalar_type() != at::kLong || slots.stride(0) != 1 || slots.size(0) < key.size(0) ||
      !cache_of(k_cache, k_scale, args.type, args.cache[0]) || !cache_of(v_cache, v_scale, args.type, args.cache[1]))
    return false;
  args.tokens = key.size(0);
  args.heads = key.size(1);
  args.dim = key.size(2);
  args.block_size = k_cache.size(1);
  const Tensor* both[] = {&key, &value};
  for (int i = 0; i < 2; ++i) {
    args.source[i] = both[i]->const_data_ptr();
    args.token_stride[i] = both[i]->stride(0);
    args.head_stride[i] = both[i]->stride(1);
  }
  args.slots = slots.const_data_ptr<int64_t>();
  perform(args);
  return true;
}

bool paged_attention(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache, const Tensor& query_start,
                     const Tensor& seq_lens, const Tensor& block_table, const Tensor& output, double scale,
                     int64_t window, const Tensor* k_scale, const Tensor* v_scale) {
  atom::AttentionArgs args;
  if (!dtype_of(query, args.type) || output.scalar_type() != query.scalar_type() || query.dim() != 3 ||
      output.sizes() != query.sizes() || query.stride(2) != 1 || output.stride(2) != 1 ||
      !cache_of(k_cache, k_scale, args.type, args.k) || !cache_of(v_cache, v_scale, args.type, args.v) ||
      k_cache.sizes() != v_cache.sizes() || query_start.scalar_type() != at::kInt || query_start.stride(0) != 1 ||
      seq_lens.scalar_type() != at::kInt || seq_lens.stride(0) != 1 || block_table.scalar_type() != at::kInt ||
      (block_table.stride(1) != 1 && block_table.size(1) != 1))
    return false;
  args.requests = query_start.size(0) - 1;
  args.tokens = query.size(0);
  args.heads = query.size(1);
  args.kv_heads = k_cache.size(2);
  args.dim = query.size(2);
  if (args.heads % args.kv_heads || k_cache.size(3) != args.dim) return false;
  args.block_size = k_cache.size(1);
  args.query = query.const_data_ptr();
  args.q_token_stride = query.stride(0);
  args.q_head_stride = query.stride(1);
  args.output = output.data_ptr();
  args.o_token_stride = output.stride(0);
  args.o_head_stride = output.stride(1);
  args.query_start = query_start.const_data_ptr<int32_t>();
  args.seq_lens = seq_lens.const_data_ptr<int32_t>();
  args.block_table = block_table.const_data_ptr<int32_t>();
  args.block_table_stride = block_table.stride(0);
  args.scale = float(scale);
  args.window = window;
  perform(args);
  return true;
}

bool argmax(const Tensor& x, Tensor& out) {
  if (x.scalar_type() != at::kFloat || x.dim() != 2 || x.stride(1) != 1 || x.size(1) == 0) return false;
  out = empty({x.size(0)}, at::kLong);
  atom::argmax(x.const_data_ptr<float>(), x.size(0), x.size(1), x.stride(0), out.data_ptr<int64_t>(),
               at::get_num_threads());
  return true;
}

// Per-row parameters of `sample`: a vector of the type, or nothing.
template <class T>
bool per_row(const Tensor* t, int64_t rows, at::ScalarType type, const T*& data) {
  data = nullptr;
  if (!t) return true;
  if (t->scalar_type() != type || t->dim() != 1 || t->size(0) != rows || !t->is_contiguous()) return false;
  data = t->const_data_ptr<T>();
  return true;
}

bool sample(const Tensor& logits, const Tensor* temperature, const Tensor* top_k, const Tensor* top_p,
            const Tensor* min_p, const Tensor* uniform, Tensor& out) {
  atom::SampleArgs args;
  if (logits.scalar_type() != at::kFloat || logits.dim() != 2 || logits.stride(1) != 1 || logits.size(1) == 0 ||
      !temperature || !uniform)
    return false;
  args.rows = logits.size(0);
  if (!per_row(temperature, args.rows, at::kFloat, args.temperature) ||
      !per_row(top_k, args.rows, at::kInt, args.top_k) || !per_row(top_p, args.rows, at::kFloat, args.top_p) ||
      !per_row(min_p, args.rows, at::kFloat, args.min_p) || !per_row(uniform, args.rows, at::kFloat, args.uniform))
    return false;
  args.cols = logits.size(1);
  args.ldx = logits.stride(0);
  args.logits = logits.const_data_ptr<float>();
  out = empty({args.rows}, at::kLong);
  args.out = out.data_ptr<int64_t>();
  atom::sample(args, at::get_num_threads());
  return true;
}

// ---- torch.ops.atom_cpu ----

const Tensor* pointer(const OptionalTensor& t) { return t ? &*t : nullptr; }
#define SUPPORTED(call) TORCH_CHECK_NOT_IMPLEMENTED(call, "not supported by the CPU kernels: use the reference")

Tensor op_linear(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t n, bool out_float32) {
  Tensor out;
  SUPPORTED(linear(x, packed, pointer(bias), n, out_float32, false, out));
  return out;
}
Tensor op_linear_silu_and_mul(const Tensor& x, const Tensor& packed, int64_t n) {
  Tensor out;
  SUPPORTED(linear(x, packed, nullptr, n, false, true, out));
  return out;
}
Tensor op_embedding(const Tensor& ids, const Tensor& table) {
  Tensor out;
  SUPPORTED(embedding(ids, table, out));
  return out;
}
Tensor op_rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Tensor out;
  SUPPORTED(norm(x, nullptr, weight, eps, false, out, nullptr));
  return out;
}
// Here nothing is changed in place: a functional op is what a compiler can reason about.
std::tuple<Tensor, Tensor> op_add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  Tensor out, total;
  SUPPORTED(norm(x, &residual, weight, eps, false, out, &total));
  return {out, total};
}
Tensor op_silu_and_mul(const Tensor& x) {
  Tensor out;
  SUPPORTED(silu_and_mul(x, out));
  return out;
}
void op_rotary(const Tensor& positions, const Tensor& query, const Tensor& key, const Tensor& cos_sin,
               bool interleaved) {
  SUPPORTED(rotary(positions, query, key, cos_sin, interleaved));
}
void op_store_kv(const Tensor& key, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache,
                 const Tensor& slots, const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  SUPPORTED(store_kv(key, value, k_cache, v_cache, slots, pointer(k_scale), pointer(v_scale)));
}
void op_paged_attention(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache, const Tensor& query_start,
                        const Tensor& seq_lens, const Tensor& block_table, const Tensor& output, double scale,
                        int64_t window, const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  SUPPORTED(paged_attention(query, k_cache, v_cache, query_start, seq_lens, block_table, output, scale, window,
                            pointer(k_scale), pointer(v_scale)));
}

// ---- plain C functions ----

const Tensor& tensor(PyObject* object) {
  if (!THPVariable_Check(object)) throw std::invalid_argument("expected a tensor");
  const Tensor& t = THPVariable_Unpack(object);
  TORCH_CHECK(t.is_cpu(), "the CPU kernels got a tensor on ", t.device());
  return t;
}
const Tensor* optional_tensor(PyObject* object) { return object == Py_None ? nullptr : &tensor(object); }
int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw std::invalid_argument("expected an integer");
  return value;
}
double real(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw std::invalid_argument("expected a number");
  return value;
}
bool truth(PyObject* object) { return object == Py_True; }
PyObject* wrap(Tensor&& t) { return THPVariable_Wrap(std::move(t)); }
PyObject* unsupported() { Py_RETURN_NOTIMPLEMENTED; }

template <int kCount, class F>
PyObject* call(Py_ssize_t count, F&& f) {
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", kCount, count);
    return nullptr;
  }
  try {
    return f();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

#define FUNCTION(name) PyObject* name(PyObject*, PyObject* const* a, Py_ssize_t count)

FUNCTION(py_pack_weight) {
  return call<2>(count, [&] {
    Tensor out;
    return pack_weight(tensor(a[0]), truth(a[1]), out) ? wrap(std::move(out)) : unsupported();
  });
}
FUNCTION(py_linear) {
  return call<5>(count, [&] {
    Tensor out;
    return linear(tensor(a[0]), tensor(a[1]), optional_tensor(a[2]), integer(a[3]), truth(a[4]), false, out)
               ? wrap(std::move(out)) : unsupported();
  });
}
FUNCTION(py_linear_argmax) {
  return call<3>(count, [&] {
    Tensor out;
    return linear_argmax(tensor(a[0]), tensor(a[1]), integer(a[2]), out) ? wrap(std::move(out)) : unsupported();
  });
}
FUNCTION(py_linear_silu_and_mul) {
  return call<3>(count, [&] {
    Tensor out;
    return linear(tensor(a[0]), tensor(a[1]), nullptr, integer(a[2]), false, true, out) ? wrap(std::move(out))
                                                                                         : unsupported();
  });
}
FUNCTION(py_norm_linear) {  // (x, residual or None, norm weight, eps, packed, bias, n, paired); changes the residual
  return call<8>(count, [&] {
    Tensor out;
    return norm_linear(tensor(a[0]), optional_tensor(a[1]), tensor(a[2]), real(a[3]), tensor(a[4]),
                       optional_tensor(a[5]), integer(a[6]), truth(a[7]), out) ? wrap(std::move(out)) : unsupported();
  });
}
FUNCTION(py_embedding) {
  return call<2>(count, [&] {
    Tensor out;
    return embedding(tensor(a[0]), tensor(a[1]), out) ? wrap(std::move(out)) : unsupported();
  });
}
FUNCTION(py_rms_norm) {
  return call<3>(count, [&] {
    Tensor out;
    return norm(tensor(a[0]), nullptr, tensor(a[1]), real(a[2]), false, out, nullptr) ? wrap(std::move(out))
                                                                                     : unsupported();
  });
}
FUNCTION(py_add_rms_norm) {  // both inputs are overwritten: x with the norm, the residual with the sum
  return call<4>(count, [&]() -> PyObject* {
    Tensor out, total;
    if (!norm(tensor(a[0]), &tensor(a[1]), tensor(a[2]), real(a[3]), true, out, &total)) return unsupported();
    PyObject* first = out.is_same(tensor(a[0])) ? Py_NewRef(a[0]) : wrap(std::move(out));
    PyObject* pair = first ? PyTuple_New(2) : nullptr;
    if (!pair) return Py_XDECREF(first), nullptr;
    PyTuple_SET_ITEM(pair, 0, first);
    PyTuple_SET_ITEM(pair, 1, Py_NewRef(a[1]));
    return pair;
  });
}
FUNCTION(py_silu_and_mul) {
  return call<1>(count, [&] {
    Tensor out;
    return silu_and_mul(tensor(a[0]), out) ? wrap(std::move(out)) : unsupported();
  });
}
FUNCTION(py_rotary) {
  return call<5>(count, [&] {
    return rotary(tensor(a[0]), tensor(a[1]), tensor(a[2]), tensor(a[3]), truth(a[4])) ? Py_NewRef(Py_None)
                                                                                       : unsupported();
  });
}
FUNCTION(py_store_kv) {
  return call<7>(count, [&] {
    return store_kv(tensor(a[0]), tensor(a[1]), tensor(a[2]), tensor(a[3]), tensor(a[4]), optional_tensor(a[5]),
                    optional_tensor(a[6])) ? Py_NewRef(Py_None) : unsupported();
  });
}
FUNCTION(py_paged_attention) {
  return call<11>(count, [&] {
    return paged_attention(tensor(a[0]), tensor(a[1]), tensor(a[2]), tensor(a[3]), tensor(a[4]), tensor(a[5]),
                           tensor(a[6]), real(a[7]), integer(a[8]), optional_tensor(a[9]), optional_tensor(a[10]))
               ? Py_NewRef(Py_None) : unsupported();
  });
}
FUNCTION(py_argmax) {
  return call<1>(count, [&] {
    Tensor out;
    return argmax(tensor(a[0]), out) ? wrap(std::move(out)) : unsupported();
  });
}
FUNCTION(py_sample) {
  return call<6>(count, [&] {
    Tensor out;
    return sample(tensor(a[0]), optional_tensor(a[1]), optional_tensor(a[2]), optional_tensor(a[3]),
                  optional_tensor(a[4]), optional_tensor(a[5]), out) ? wrap(std::move(out)) : unsupported();
  });
}

// ---- recorded steps ----

template <class T>
PyObject* capsule(std::shared_ptr<T> owned, const char* name) {
  auto* held = new std::shared_ptr<T>(std::move(owned));
  PyObject* made = PyCapsule_New(held, name, [](PyObject* object) {
    delete static_cast<std::shared_ptr<T>*>(PyCapsule_GetPointer(object, PyCapsule_GetName(object)));
  });
  if (!made) delete held;
  return made;
}
template <class T>
std::shared_ptr<T> held_by(PyObject* object, const char* name) {
  auto* held = static_cast<std::shared_ptr<T>*>(PyCapsule_GetPointer(object, name));
  if (!held) throw std::invalid_argument(std::string("expected an ") + name);
  return *held;
}
constexpr const char *kArena = "atom_cpu.arena", *kTape = "atom_cpu.tape";

// input ids, positions, slots, where queries start, sequence lengths, block table.
atom::StepInputs step_inputs(PyObject* const* a) {
  const Tensor& table = tensor(a[5]);
  for (int i = 0; i < 5; ++i) TORCH_CHECK(tensor(a[i]).is_contiguous(), "a step's input ", i, " is not contiguous");
  TORCH_CHECK(table.dim() == 2 && (table.stride(1) == 1 || table.size(1) == 1), "the block table's rows have gaps");
  return {tensor(a[0]).const_data_ptr<int64_t>(), tensor(a[1]).const_data_ptr<int64_t>(),
          tensor(a[2]).const_data_ptr<int64_t>(), tensor(a[3]).const_data_ptr<int32_t>(),
          tensor(a[4]).const_data_ptr<int32_t>(), table.const_data_ptr<int32_t>(), table.stride(0)};
}

FUNCTION(py_make_arena) {
  return call<0>(count, [&] { (void)a; return capsule(std::make_shared<atom_memory::Arena>(), kArena); });
}
FUNCTION(py_start_recording) {  // (arena) -> tape of this thread's calls from now on; their results live in the arena
  return call<1>(count, [&] {
    TORCH_CHECK(!recording, "this thread records already");
    auto tape = std::make_shared<atom::Tape>();
    recording = std::make_unique<Recording>(Recording{held_by<atom_memory::Arena>(a[0], kArena), tape});
    return capsule(std::move(tape), kTape);
  });
}
FUNCTION(py_stop_recording) {
  return call<0>(count, [&] { (void)a; recording.reset(); return Py_NewRef(Py_None); });
}
FUNCTION(py_new_empty) {  // (like, shape) -> a tensor of its type, where results of kernels are
  return call<2>(count, [&] {
    std::vector<int64_t> shape;
    for (Py_ssize_t i = 0; i < PySequence_Size(a[1]); ++i) {
      PyObject* size = PySequence_GetItem(a[1], i);
      shape.push_back(size ? integer(size) : 0);
      Py_XDECREF(size);
    }
    return wrap(empty(shape, tensor(a[0]).scalar_type()));
  });
}
FUNCTION(py_borrow) {  // the same memory, not kept alive
  return call<1>(count, [&] {
    const Tensor& t = tensor(a[0]);
    return wrap(at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options()));
  });
}
FUNCTION(py_tape_reads) {  // (tape, inputs) -> whether these are all that it reads of a step
  return call<7>(count, [&] { return PyBool_FromLong(held_by<atom::Tape>(a[0], kTape)->reads(step_inputs(a + 1))); });
}
FUNCTION(py_replay) {  // (tape, inputs): one step at a time
  return call<7>(count, [&] {
    const auto tape = held_by<atom::Tape>(a[0], kTape);
    const atom::StepInputs inputs = step_inputs(a + 1);
    int64_t wrong;
    Py_BEGIN_ALLOW_THREADS
    wrong = tape->replay(inputs, at::get_num_threads());
    Py_END_ALLOW_THREADS
    TORCH_CHECK_INDEX(wrong < 0, "embedding: id ", inputs.ids[wrong], " is not within the table");
    return Py_NewRef(Py_None);
  });
}
FUNCTION(py_bind_threads) {  // a tuple of CPUs, the i-th for thread i
  return call<1>(count, [&]() -> PyObject* {
    std::vector<int> cpus;
    for (Py_ssize_t i = 0; i < PyTuple_Size(a[0]); ++i) cpus.push_back(int(integer(PyTuple_GetItem(a[0], i))));
    if (PyErr_Occurred()) return nullptr;
    if ((errno = atom::bind_team(cpus.data(), int(cpus.size())))) return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
  });
}
PyObject* py_isa(PyObject*, PyObject*) { return PyUnicode_FromString(atom::isa()); }

#define METHOD(name) {#name, (PyCFunction)(void*)py_##name, METH_FASTCALL, nullptr}
PyMethodDef methods[] = {METHOD(pack_weight), METHOD(linear), METHOD(linear_argmax),
                         METHOD(linear_silu_and_mul), METHOD(norm_linear), METHOD(embedding),
                         METHOD(rms_norm), METHOD(add_rms_norm), METHOD(silu_and_mul), METHOD(rotary),
                         METHOD(store_kv), METHOD(paged_attention), METHOD(argmax), METHOD(sample), METHOD(make_arena),
                         METHOD(start_recording), METHOD(stop_recording), METHOD(new_empty), METHOD(borrow),
                         METHOD(tape_reads), METHOD(replay), METHOD(bind_threads),
                         {"isa", py_isa, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "atom_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

TORCH_LIBRARY(atom_cpu, m) {
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, int out_features, bool out_float32) -> Tensor");
  m.def("linear_silu_and_mul(Tensor x, Tensor packed, int intermediate_size) -> Tensor");
  m.def("embedding(Tensor input_ids, Tensor weight) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("silu_and_mul(Tensor x) -> Tensor");
  m.def("rotary(Tensor positions, Tensor(a!) query, Tensor(b!) key, Tensor cos_sin, bool interleaved) -> ()");
  m.def("store_kv(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
        "Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> ()");
  m.def("paged_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor query_start, Tensor seq_lens, "
        "Tensor block_table, Tensor(a!) output, float scale, int window, Tensor? k_scale, Tensor? v_scale) -> ()");
}
TORCH_LIBRARY_IMPL(atom_cpu, CPU, m) {
  m.impl("linear", op_linear);
  m.impl("linear_silu_and_mul", op_linear_silu_and_mul);
  m.impl("embedding", op_embedding);
  m.impl("rms_norm", op_rms_norm);
  m.impl("add_rms_norm", op_add_rms_norm);
  m.impl("silu_and_mul", op_silu_and_mul);
  m.impl("rotary", op_rotary);
  m.impl("store_kv", op_store_kv);
  m.impl("paged_attention", op_paged_attention);
}

PyMODINIT_FUNC PyInit_atom_cpu() { return PyModule_Create(&module); }
