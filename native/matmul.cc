// Shares the blocks of a product out over a team and runs the kernels on them.
#include "matmul.h"

#include <algorithm>
#include <cstring>

#include "bit_products.h"
#include "crossover.h"
#include "matmul_kernels.h"
#include "panel.h"
#include "side_terms.h"

namespace lowbit {
namespace {

constexpr size_t kAlign = 64;

uint8_t* align(uint8_t* p) {
  return reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(p), kAlign));
}

// Writes accumulators [tokens][32] of a block to out, leaving padded rows out. A copy of constant size is a
// few vector moves; one of variable size costs more than the block's last segment.
void store_block(const Product& p, size_t block, size_t first, size_t count, const float* acc) {
  const size_t row = block * kBlockRows;
  const size_t rows = std::min(kBlockRows, p.matrix->out_features - row);
  float* out = p.out + first * p.stride + row;
  if (rows == kBlockRows) {
    for (size_t c = 0; c < count; ++c)
      std::memcpy(out + c * p.stride, acc + c * kBlockRows, kBlockRows * sizeof(float));
    return;
  }
  for (size_t c = 0; c < count; ++c)
    std::memcpy(out + c * p.stride, acc + c * kBlockRows, rows * sizeof(float));
}

// Tokens that meet one block after another while their activations are near.
constexpr size_t kTokens = 24;
// The same for floats alone, which are widened anew for each such group.
constexpr size_t kFloatTokens = 96;

size_t panel_bytes(const Matrix& m, size_t padded) {
  size_t bytes = 0;
  for (const CodeTerm& t : m.codes) bytes += lay_out_panel(t, padded, nullptr, nullptr);
  return bytes;
}

// Blocks unpacked together, so that the activations of kTokens tokens are read once for all of them: their
// panels, the packed weights of as many that follow and those activations share the second-level cache of a
// core.
constexpr size_t kCacheShare = 576 * 1024, kMostBlocks = 16;

size_t blocks_together(const Matrix& m, const Activations& a) {
  if (a.tokens <= 2 * kTokens || m.codes.empty()) return 1;
  size_t bytes = panel_bytes(m, a.padded);
  for (const CodeTerm& t : m.codes) bytes += code_block_bytes(t, m.chunks());
  return std::clamp<size_t>(kCacheShare / bytes, 1, kMostBlocks);
}

// Asks for part `part` of `parts` of the packed weights of blocks [block, block + n) while others are
// multiplied.
void prefetch_codes(const Matrix& m, size_t block, size_t n, size_t part, size_t parts) {
  for (const CodeTerm& t : m.codes) {
    const size_t bytes = code_block_bytes(t, m.chunks());
    const uint8_t* const codes = t.codes + block * bytes;
    for (size_t at = n * bytes * part / parts / kAlign * kAlign; at < n * bytes * (part + 1) / parts;
         at += kAlign)
      __builtin_prefetch(codes + at, 0, 2);
  }
}

// Blocks [block, block + n) of a product; `stop` is the end of this member's share.
void block_products(const Product& p, size_t block, size_t n, size_t stop, const Activations& a,
                    MatmulScratch& scratch) {
  const MatmulKernels& kernels = matmul_kernels();
  const Matrix& m = *p.matrix;
  const size_t tokens = m.codes.empty() ? kFloatTokens : kTokens;
  const size_t each = panel_bytes(m, a.padded), acc_bytes = tokens * kBlockRows * sizeof(float);
  uint8_t* const memory = scratch.get(acc_bytes + n * each);
  float* const acc = reinterpret_cast<float*>(memory);
  uint8_t* panel = memory + acc_bytes;
  for (size_t b = 0; b < n; ++b)
    for (const CodeTerm& t : m.codes) {
      kernels.unpack(t, block + b, m.chunks(), panel);
      panel += lay_out_panel(t, a.padded, nullptr, nullptr);
    }
  const size_t following = std::min(n, stop - block - n), parts = (a.tokens + kTokens - 1) / kTokens * n;
  size_t part = 0;
  for (size_t first = 0; first < a.tokens; first += tokens) {
    const size_t count = std::min(tokens, a.tokens - first);
    panel = memory + acc_bytes;
    for (size_t b = 0; b < n; ++b) {
      // Whole blocks of codes go straight to the output, all others through a buffer.
      const bool direct = a.tokens > 1 && m.floats.empty() && !m.codes.empty() &&
                          (block + b + 1) * kBlockRows <= m.out_features;
      float* const out = direct ? p.out + first * p.stride + (block + b) * kBlockRows : acc;
      const size_t stride = direct ? p.stride : kBlockRows;
      if (!direct) std::memset(acc, 0, count * kBlockRows * sizeof(float));
      bool fresh = direct;
      for (const CodeTerm& t : m.codes) {
        kernels.gemm(t, panel, a, first, count, out, stride, fresh);
        fresh = false;
        panel += lay_out_panel(t, a.padded, nullptr, nullptr);
      }
      for (const FloatTerm& t : m.floats) kernels.float_product(t, block + b, a, first, count, acc);
      if (!direct) store_block(p, block + b, first, count, acc);
      if (a.tokens > kTokens) prefetch_codes(m, block + n, following, part++, parts);
    }
  }
}

// Blocks [block, stop) times the only token, several at a time: what a block costs before its first and after
// its last step counts in a small matrix.
constexpr size_t kBlocksAtOnce = 8;

size_t scratch_bytes(const Matrix& m, size_t padded) {
  size_t bytes = 0;
  for (const CodeTerm& t : m.codes) bytes = std::max(bytes, gemv_scratch_bytes(t, padded));
  return bytes;
}

void one_token_product(const Product& p, size_t block, size_t stop, const Activations& a,
                       MatmulScratch& scratch) {
  const MatmulKernels& kernels = matmul_kernels();
  const Matrix& m = *p.matrix;
  uint8_t* const memory = scratch.get(scratch_bytes(m, a.padded));
  alignas(kAlign) float acc[kBlocksAtOnce * kBlockRows];
  for (; block < stop; block += kBlocksAtOnce) {
    const size_t count = std::min(kBlocksAtOnce, stop - block);
    std::memset(acc, 0, count * kBlockRows * sizeof(float));
    for (const CodeTerm& t : m.codes) kernels.gemv(t, block, count, a, 0, acc, memory);
    for (size_t b = 0; b < count; ++b) {
      for (const FloatTerm& t : m.floats) kernels.float_product(t, block + b, a, 0, 1, acc + b * kBlockRows);
      store_block(p, block + b, 0, 1, acc + b * kBlockRows);
    }
  }
}

// Blocks [block, stop) times several tokens, each block decoded in registers: its codes come from memory for
// the first tokens and from a cache for the others. As many blocks at a time as sums stay near.
constexpr size_t kSumsAtOnce = 192;

void few_tokens_product(const Product& p, size_t block, size_t stop, const Activations& a, CodeKernel kernel,
                        MatmulScratch& scratch) {
  const MatmulKernels& kernels = matmul_kernels();
  const Matrix& m = *p.matrix;
  const size_t together = std::clamp<size_t>(kSumsAtOnce / a.tokens, 1, kBlocksAtOnce);
  const size_t sums = together * a.tokens * kBlockRows;
  size_t bytes = scratch_bytes(m, a.padded);
  if (kernel == CodeKernel::few)
    for (const CodeTerm& t : m.codes) bytes = std::max(bytes, few_scratch_bytes(t, a.padded, a.tokens));
  float* const acc = reinterpret_cast<float*>(scratch.get(sums * sizeof(float) + bytes));
  uint8_t* const memory = reinterpret_cast<uint8_t*>(acc + sums);
  for (size_t count; block < stop; block += count) {
    count = std::min(together, stop - block);
    std::memset(acc, 0, count * a.tokens * kBlockRows * sizeof(float));
    for (const CodeTerm& t : m.codes) {
      if (kernel == CodeKernel::few) {
        kernels.few(t, block, count, a, acc, memory);
        continue;
      }
      for (size_t i = 0; i < count * a.tokens; ++i)
        kernels.gemv(t, block + i / a.tokens, 1, a, i % a.tokens, acc + i * kBlockRows, memory);
    }
    for (size_t b = 0; b < count; ++b) {
      float* const sum = acc + b * a.tokens * kBlockRows;
      for (const FloatTerm& t : m.floats) kernels.float_product(t, block + b, a, 0, a.tokens, sum);
      store_block(p, block + b, 0, a.tokens, sum);
    }
  }
}

// `a` with the tables that these products of one token take, which each member makes for itself: there is no
// barrier before the product.
Activations with_tables(const Product* products, size_t count, Activations a, size_t threads) {
  static thread_local MatmulScratch scratch;
  for (size_t i = 0; i < count; ++i)
    for (const CodeTerm& t : products[i].matrix->codes)
      if (takes_table(*products[i].matrix, t, a.limbs, threads)) a.table_widths |= 1u << t.bits;
  const bool needed[2] = {(a.table_widths & 0b1010) != 0, (a.table_widths & 0b1100) != 0};
  if (!needed[0] && !needed[1]) return a;
  uint8_t* memory = scratch.get(plane_table_bytes(a, 1) + plane_table_bytes(a, 2));
  for (int width = 1; width <= 2; memory += plane_table_bytes(a, width++)) {
    if (needed[width - 1]) matmul_kernels().build_tables(a, width, memory);
    a.tables[width - 1] = memory;
  }
  return a;
}

// Blocks [block, stop) of one product.
void product_blocks(const Product& p, size_t block, size_t stop, const Activations& a,
                    MatmulScratch& scratch) {
  const CodeKernel kernel = code_kernel(*p.matrix, a.tokens);
  if (a.tokens == 1 && kernel != CodeKernel::gemm) return one_token_product(p, block, stop, a, scratch);
  if (takes_bits(*p.matrix, stop - block, a.tokens, a.limbs)) return bit_products(p, block, stop, a, scratch);
  if (kernel == CodeKernel::few || kernel == CodeKernel::gemv)
    return few_tokens_product(p, block, stop, a, kernel, scratch);
  const size_t together = blocks_together(*p.matrix, a);
  for (size_t n; block < stop; block += n) {
    n = std::min(together, stop - block);
    block_products(p, block, n, stop, a, scratch);
  }
}

// What a block of a job costs, in tokens: decoding it, then multiplying.
constexpr size_t kDecodeTokens = 8;

size_t job_cost(const Job& job) { return kDecodeTokens + job.activations.tokens; }

}  // namespace

size_t Matrix::bytes() const {
  size_t total = 0;
  for (const CodeTerm& t : codes) {
    const size_t groups = blocks() * t.groups * kBlockRows;
    const size_t wide = t.factors ? groups / t.span : groups;  // numbers that are no factors
    total += blocks() * code_block_bytes(t, chunks()) + wide * number_bytes(t.scale_type);
    if (t.factors) total += groups;
    if (t.offset_factors) total += groups;
    if (t.multipliers) total += blocks() * t.multiplier_groups * kTileRows;
    if (t.zero_points) total += groups;
    if (t.selectors) total += groups;
    if (t.offsets) total += wide * number_bytes(t.offset_type);
  }
  for (const FloatTerm& t : floats)
    total += t.values ? blocks() * in_features * kBlockRows * number_bytes(t.type)
                      : entropy_bytes(t.entropy, blocks(), in_features);
  return total + side_bytes(*this);
}

uint8_t* MatmulScratch::get(size_t bytes) {
  if (bytes + kAlign > capacity_) {
    memory_.reset(new uint8_t[bytes + kAlign]);
    capacity_ = bytes + kAlign;
  }
  return align(memory_.get());
}

void plain_products(const Member& member, const Product* products, size_t count,
                    const Activations& activations, MatmulScratch& scratch) {
  const Activations a =
      activations.tokens == 1 ? with_tables(products, count, activations, member.count) : activations;
  size_t total = 0;
  for (size_t i = 0; i < count; ++i) total += products[i].matrix->blocks();
  size_t begin, end;
  member.share(total, &begin, &end);
  for (size_t i = 0, base = 0; i < count && base < end; base += products[i++].matrix->blocks()) {
    const Product& p = products[i];
    const size_t block = begin > base ? begin - base : 0, stop = std::min(p.matrix->blocks(), end - base);
    if (block < stop) product_blocks(p, block, stop, a, scratch);
  }
}

void plain_jobs(const Member& member, const Job* jobs, size_t count, MatmulScratch& scratch) {
  size_t total = 0, begin, end;
  for (size_t i = 0; i < count; ++i) total += job_cost(jobs[i]) * jobs[i].product.matrix->blocks();
  member.share(total, &begin, &end);
  std::vector<Product> same;  // of this member's jobs, those that read one row of activations
  Activations tabled;
  for (size_t i = 0, base = 0; i < count && base < end; ++i) {
    const Job& job = jobs[i];
    const size_t cost = job_cost(job), blocks = job.product.matrix->blocks(), first = base;
    base += cost * blocks;
    if (base <= begin) continue;
    const size_t block = begin > first ? (begin - first + cost - 1) / cost : 0;
    const size_t stop = std::min(blocks, (end - first + cost - 1) / cost);
    if (block >= stop) continue;
    if (job.activations.tokens != 1) {
      product_blocks(job.product, block, stop, job.activations, scratch);
      continue;
    }
    if (same.empty() || tabled.high != job.activations.high) {
      same.clear();
      size_t reached = first;
      for (size_t k = i; k < count && reached < end && jobs[k].activations.tokens == 1 &&
                         jobs[k].activations.high == job.activations.high;
           ++k) {
        same.push_back(jobs[k].product);
        reached += job_cost(jobs[k]) * jobs[k].product.matrix->blocks();
      }
      tabled = with_tables(same.data(), same.size(), job.activations, member.count);
    }
    product_blocks(job.product, block, stop, tabled, scratch);
  }
}

}  // namespace lowbit
