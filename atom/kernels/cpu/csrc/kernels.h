// The kernels: plain pointers and strides, no torch. Strides count elements; `threads` is the most to use.
#pragma once
#include <cstdint>

namespace atom {

enum class DType { f32, bf16, f16, f8e4m3 };

// ---- dense layers (gemm.cpp) ----
// A packed weight holds panels of 16 output columns, each [ksteps(K)][16][kwidth]: the K values of a step lie
// side by side as the dot-product instruction wants them. Columns and K are padded with zeros.
constexpr int64_t kPanel = 16;
inline int64_t kwidth(DType t) { return t == DType::bf16 ? 2 : 1; }
int64_t ksteps(DType t, int64_t k);
inline int64_t element_size(DType t) { return t == DType::f32 ? 4 : t == DType::f8e4m3 ? 1 : 2; }

// weight [n, k] with row stride ldw -> packed. paired: rows are gate above up (n = 2 * I); panels alternate
// between 16 gate and 16 up columns, so that one tile holds both.
void pack_weight(DType type, const void* weight, int64_t n, int64_t k, int64_t ldw, bool paired, void* packed,
                 int threads);
inline int64_t num_panels(int64_t n, bool paired) {
  return paired ? 2 * ((n / 2 + kPanel - 1) / kPanel) : (n + kPanel - 1) / kPanel;
}

// What rms_norm makes of a product's rows before they are multiplied.
struct RowNorm {
  const void* weight = nullptr;  // [k]; null: nothing
  float eps = 0;
  void* residual = nullptr;  // becomes x + residual, which is what is normalized; or null
  int64_t ldr = 0;
};

class Largest;
struct LinearArgs {
  DType type;            // of x and the weight
  DType out_type;        // the same, or f32
  int64_t m, n, k;       // x [m, k]; n output columns (I when paired)
  const void* x;
  int64_t ldx;
  const void* packed;
  const void* bias;      // [n] or null
  DType bias_type;
  void* out;             // [m, n], contiguous
  bool paired;           // out = silu(gate) * up
  RowNorm norm;
  Largest* largest = nullptr;  // where results are noted instead, if given
};
void linear(const LinearArgs& args, int threads);
// Of each row's results in f32 the first of the largest, or the first NaN; args.out is not used.
void linear_argmax(LinearArgs args, int64_t* out, int threads);

// ---- look-up (embedding.cpp) ----
struct TakeArgs {
  const void* table;
  int64_t row_bytes, stride_bytes;
  int64_t rows;        // of the table
  const int64_t* ids;  // within the table
  int64_t count;
  void* out;           // [count] rows, contiguous
};
void take_rows(const TakeArgs& args, int threads);
// The place of the first id that is not within the table, or -1.
int64_t outside(const TakeArgs& args);

// ---- elementwise ----
// residual == null: out = rms_norm(x). Otherwise total = x + residual and out = rms_norm(total).
struct NormArgs {
  DType type;
  int64_t rows, cols;
  const void* x;
  int64_t ldx;
  int64_t group, ldg;  // of x: `group` rows lie ldx apart, such groups ldg: heads of tokens
  const void* residual;
  int64_t ldr;
  const void* weight;
  float eps;
  void* out;    // [rows, cols], may be x
  int64_t ldo;
  void* total;  // may be the residual
  int64_t ldt;
};
void rms_norm(const NormArgs& args, int threads);

struct SiluArgs {
  DType type;
  int64_t rows, half;
  const void* x;  // [rows, 2 * half], gate beside up
  int64_t ldx;
  void* out;      // [rows, half], contiguous
};
void silu_and_mul(const SiluArgs& args, int threads);

struct RotaryArgs {
  DType type;
  int64_t tokens, rotary_dim;
  bool interleaved;
  const int64_t* positions;
  const float* cos_sin;  // [max_position, rotary_dim]
  void* x[2];            // query and key
  int64_t heads[2], token_stride[2], head_stride[2];
};
void rotary_embedding(const RotaryArgs& args, int threads);
void rotate_token(const RotaryArgs& args, int64_t token);

// ---- sampling ----
void argmax(const float* x, int64_t rows, int64_t cols, int64_t ldx, int64_t* out, int threads);

struct SampleArgs {
  int64_t rows, cols, ldx;
  const float *logits, *temperature;
  const int32_t* top_k;         // these three may be null
  const float *top_p, *min_p;
  const float* uniform;
  int64_t* out;
};
void sample(const SampleArgs& args, int threads);

// ---- paged cache ----
struct Cache {  // one of k and v
  DType type;
  void* data;           // [num_blocks, block_size, heads, dim] with these strides, last dim contiguous
  int64_t block_stride, slot_stride, head_stride;
  float* scale;         // [num_blocks, block_size, heads], or null
  int64_t scale_block_stride, scale_slot_stride, scale_head_stride;
};

struct StoreArgs {
  DType type;
  int64_t tokens, heads, dim, block_size;
  const void* source[2];  // key and value
  int64_t token_stride[2], head_stride[2];
  Cache cache[2];
  const int64_t* slots;
};
void store_kv(const StoreArgs& args, int threads);

struct AttentionArgs {
  DType type;  // of query and output
  int64_t requests, tokens, heads, kv_heads, dim, block_size;
  const void* query;
  int64_t q_token_stride, q_head_stride;
  void* output;
  int64_t o_token_stride, o_head_stride;
  Cache k, v;
  const int32_t* query_start;  // [requests + 1]
  const int32_t* seq_lens;     // [requests]
  const int32_t* block_table;
  int64_t block_table_stride;
  float scale;
  int64_t window;  // 0 = none
};
void paged_attention(const AttentionArgs& args, int threads);
// After rotating queries and keys (if rotary is given), and filling the cache: where each request has one token, the
// thread that attends to it does all three, as it has the cache lines that a key and a value become part of.
void paged_attention(const RotaryArgs* rotary, const StoreArgs& store, const AttentionArgs& args, int threads);

const char* isa();

}  // namespace atom
