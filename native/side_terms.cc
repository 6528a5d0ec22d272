// Products of matrices that have more than codes and plain floats: sparse terms, outlier columns and entries,
// low rank, codes of some rows, inputs excluded from the codes, and codes over gathered inputs. What all
// members need (activations without excluded inputs or in another order, v * x of low-rank terms) is made
// once, shared out, before the products.
#include "side_terms.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "matmul.h"
#include "matmul_kernels.h"
#include "panel.h"
#include "side_kernels.h"

namespace lowbit {

#define LOWBIT_DECLARE(isa)        \
  namespace isa {                  \
  SideKernels make_side_kernels(); \
  }
LOWBIT_EVERY_ISA(LOWBIT_DECLARE)

static SideKernels make() {
#define LOWBIT_CASE(isa) \
  case Isa::isa:         \
    return isa::make_side_kernels();
  switch (active_isa()) {
    LOWBIT_EVERY_ISA(LOWBIT_CASE)
    default:
      return scalar::make_side_kernels();
  }
}

const SideKernels& side_kernels() {
  static const SideKernels table = make();
  return table;
}

// What the members share during one call of matmul().
struct SideMemory {
  static constexpr size_t kOwn = static_cast<size_t>(-1);
  struct Rounding {  // activations without the inputs that some matrix excludes, or gathered for it
    const std::vector<uint32_t>* list;
    bool gathers;
    Activations activations;
  };
  std::vector<std::unique_ptr<ActivationBuffer>> buffers;
  std::vector<Rounding> roundings;
  std::vector<size_t> rounding;           // by product: number in `roundings`, or kOwn: as they came
  std::vector<float> projections;         // v * x of every low-rank term
  std::vector<size_t> projection_starts;  // by product
  std::vector<float> of_rows;             // products of every term of rows, [tokens][rows]
  std::vector<size_t> of_rows_starts;     // by product
};

namespace {

bool excludes(const std::vector<uint32_t>* list, const Matrix& m) {
  return list ? *list == m.excluded : m.excluded.empty();
}

bool needs_rounding(const Activations& a, const Matrix& m) {
  return m.reads_integers() && !excludes(a.excluded, m);
}

void plan(SideMemory& memory, const Product* products, size_t count, const Activations& a) {
  memory.roundings.clear();
  memory.rounding.assign(count, SideMemory::kOwn);
  memory.projection_starts.assign(count, 0);
  memory.of_rows_starts.assign(count, 0);
  size_t floats = 0, of_rows = 0;
  for (size_t i = 0; i < count; ++i) {
    const Matrix& m = *products[i].matrix;
    memory.projection_starts[i] = floats;
    memory.of_rows_starts[i] = of_rows;
    for (const LowRankTerm& t : m.low_rank) floats += a.tokens * t.rank;
    for (const RowsTerm& t : m.rows) of_rows += a.tokens * t.rows.size();
    const bool gathers = !m.gathered.empty();
    if (!gathers && !needs_rounding(a, m)) continue;
    const std::vector<uint32_t>* const list = gathers ? &m.gathered.front().inputs : &m.excluded;
    const auto same = std::find_if(memory.roundings.begin(), memory.roundings.end(), [&](const auto& r) {
      return r.gathers == gathers && (r.list == list || *r.list == *list);
    });
    const size_t number = static_cast<size_t>(same - memory.roundings.begin());
    memory.rounding[i] = number;
    if (same != memory.roundings.end()) continue;
    if (memory.buffers.size() <= number) memory.buffers.push_back(std::make_unique<ActivationBuffer>());
    const size_t inputs = gathers ? list->size() : a.in_features;
    Activations rounded = memory.buffers[number]->prepare(a.tokens, inputs, a.limbs, a.values);
    rounded.value_stride = a.in_features;
    (gathers ? rounded.gathered : rounded.excluded) = list;
    memory.roundings.push_back({list, gathers, rounded});
  }
  if (memory.projections.size() < floats) memory.projections.resize(floats);
  if (memory.of_rows.size() < of_rows) memory.of_rows.resize(of_rows);
}

// This member's share of what plan() laid out.
void prepare(const Member& member, SideMemory& memory, const Product* products, size_t count,
             const Activations& a) {
  size_t begin, end;
  member.share(a.tokens, &begin, &end);
  for (const SideMemory::Rounding& r : memory.roundings) quantize_rows(r.activations, begin, end);
  for (size_t i = 0; i < count; ++i) {
    float* out = memory.projections.data() + memory.projection_starts[i];
    for (const LowRankTerm& t : products[i].matrix->low_rank) {
      if (a.tokens >= member.count) {
        side_kernels().project(t, a.in_features, a.values + begin * a.in_features, end - begin, 0, t.rank,
                               out + begin * t.rank);
      } else {
        size_t first, last;
        member.share(t.rank, &first, &last);
        side_kernels().project(t, a.in_features, a.values, a.tokens, first, last, out);
      }
      out += a.tokens * t.rank;
    }
  }
}

// The results of a block, [tokens][32], out of and back into the output.
constexpr size_t kTokens = 24;  // as in matmul.cc

class Block {
 public:
  Block(const Product& p, size_t block) : out_(p.out + block * kBlockRows), stride_(p.stride) {
    rows_ = std::min(kBlockRows, p.matrix->out_features - block * kBlockRows);
  }
  void load(size_t first, size_t count, float* acc) const {
    for (size_t t = 0; t < count; ++t) {
      std::memset(acc + t * kBlockRows, 0, kBlockRows * sizeof(float));
      std::memcpy(acc + t * kBlockRows, out_ + (first + t) * stride_, rows_ * sizeof(float));
    }
  }
  void store(size_t first, size_t count, const float* acc) const {
    for (size_t t = 0; t < count; ++t)
      std::memcpy(out_ + (first + t) * stride_, acc + t * kBlockRows, rows_ * sizeof(float));
  }
  // The same as [32][width].
  void load_wide(size_t first, size_t count, size_t width, float* acc) const {
    std::memset(acc, 0, kBlockRows * width * sizeof(float));
    for (size_t t = 0; t < count; ++t)
      for (size_t r = 0; r < rows_; ++r) acc[r * width + t] = out_[(first + t) * stride_ + r];
  }
  void store_wide(size_t first, size_t count, size_t width, const float* acc) const {
    for (size_t t = 0; t < count; ++t)
      for (size_t r = 0; r < rows_; ++r) out_[(first + t) * stride_ + r] = acc[r * width + t];
  }

 private:
  float* out_;
  size_t stride_, rows_;
};

// One block of a sparse term as a dense term of one block, its codes spread to `codes`.
CodeTerm spread_block(const SparseTerm& s, size_t block, size_t chunks, uint8_t* codes) {
  side_kernels().sparse_expand(s, block, chunks, codes);
  CodeTerm dense = s.term;
  dense.bits = 8;
  dense.codes = codes;
  dense.scales = static_cast<const uint8_t*>(s.term.scales) +
                 block * s.term.groups * kBlockRows * number_bytes(s.term.scale_type);
  return dense;
}

void add_sparse(const Product& p, size_t begin, size_t end, const Activations& a, MatmulScratch& scratch) {
  const MatmulKernels& kernels = matmul_kernels();
  const size_t chunks = p.matrix->chunks(), bytes = chunks * kChunk * kBlockRows;
  size_t panel_bytes = 0;
  for (const SparseTerm& s : p.matrix->sparse)
    panel_bytes = std::max(panel_bytes, lay_out_panel(s.term, a.padded, nullptr, nullptr));
  float* const acc =
      reinterpret_cast<float*>(scratch.get(kTokens * kBlockRows * sizeof(float) + bytes + panel_bytes));
  uint8_t* const codes = reinterpret_cast<uint8_t*>(acc + kTokens * kBlockRows);
  uint8_t* const panel = codes + bytes;
  for (size_t b = begin; b < end; ++b) {
    const Block block(p, b);
    for (const SparseTerm& s : p.matrix->sparse) {
      if (a.tokens == 1 && s.term.group_size % kChunk == 0) {
        block.load(0, 1, acc);
        side_kernels().sparse_gemv(s, b, a, 0, acc);
        block.store(0, 1, acc);
        continue;
      }
      const CodeTerm dense = spread_block(s, b, chunks, codes);
      kernels.unpack(dense, 0, chunks, panel);
      for (size_t first = 0; first < a.tokens; first += kTokens) {
        const size_t count = std::min(kTokens, a.tokens - first);
        block.load(first, count, acc);
        kernels.gemm(dense, panel, a, first, count, acc, kBlockRows, false);
        block.store(first, count, acc);
      }
    }
  }
}

// Columns and low rank: x is [tokens][in_features], v * x is [tokens][rank].
void add_columns(const Product& p, size_t begin, size_t end, const Activations& a, const float* projections,
                 MatmulScratch& scratch) {
  const Matrix& m = *p.matrix;
  const SideKernels& kernels = side_kernels();
  float* acc = reinterpret_cast<float*>(scratch.get(kTokens * kBlockRows * sizeof(float)));
  for (size_t b = begin; b < end; ++b) {
    const Block block(p, b);
    for (size_t first = 0; first < a.tokens; first += kTokens) {
      const size_t count = std::min(kTokens, a.tokens - first);
      block.load(first, count, acc);
      for (const ColumnsTerm& t : m.columns)
        kernels.add_columns(t.values + b * t.columns.size() * kBlockRows, t.columns.data(), t.columns.size(),
                            a.values + first * a.in_features, a.in_features, count, acc);
      const float* projected = projections;
      for (const LowRankTerm& t : m.low_rank) {
        kernels.add_columns(t.u + b * t.rank * kBlockRows, nullptr, t.rank, projected + first * t.rank,
                            t.rank, count, acc);
        projected += a.tokens * t.rank;
      }
      block.store(first, count, acc);
    }
  }
}

// Rows of blocks [begin, end): products holds [tokens][rows] of one term after the other.
void add_rows(const Product& p, size_t begin, size_t end, size_t tokens, const float* products) {
  for (const RowsTerm& t : p.matrix->rows) {
    const auto place = [&](size_t block) {
      return static_cast<size_t>(std::lower_bound(t.rows.begin(), t.rows.end(), block * kBlockRows) -
                                 t.rows.begin());
    };
    const size_t first = place(begin), last = place(end), count = t.rows.size();
    for (size_t token = 0; token < tokens; ++token)
      for (size_t k = first; k < last; ++k)
        p.out[token * p.stride + t.rows[k]] += products[token * count + k];
    products += tokens * count;
  }
}

constexpr size_t kWide =
    32;  // tokens of entries at a time: 4,096 inputs of them are half a second-level cache

void add_entries(const Product& p, size_t begin, size_t end, const Activations& a, MatmulScratch& scratch) {
  const Matrix& m = *p.matrix;
  const SideKernels& kernels = side_kernels();
  const size_t n = a.in_features;
  float* acc = reinterpret_cast<float*>(scratch.get((kBlockRows + n) * kWide * sizeof(float)));
  float* wide = acc + kBlockRows * kWide;
  for (size_t first = 0; first < a.tokens; first += kWide) {
    const size_t count = std::min(kWide, a.tokens - first);
    const bool single = a.tokens == 1;
    const size_t width = single ? 1 : round_up(count, 16);
    if (!single) {
      if (count < width) std::memset(wide, 0, n * width * sizeof(float));
      for (size_t k = 0; k < n; k += 16)
        for (size_t t = 0; t < count; ++t)
          for (size_t i = k; i < std::min(k + 16, n); ++i)
            wide[i * width + t] = a.values[(first + t) * n + i];
    }
    for (size_t b = begin; b < end; ++b) {
      const Block block(p, b);
      single ? block.load(0, 1, acc) : block.load_wide(first, count, width, acc);
      for (const EntriesTerm& t : m.entries) {
        if (single)
          kernels.add_entries(t, t.starts[b], t.starts[b + 1], a.values, acc);
        else
          kernels.add_entries_wide(t, t.starts[b], t.starts[b + 1], wide, width, acc);
      }
      single ? block.store(0, 1, acc) : block.store_wide(first, count, width, acc);
    }
  }
}

void products_with_sides(const Member& member, const Product* products, size_t count, const Activations& a,
                         MatmulScratch& scratch) {
  member.barrier();  // the last call's readers are done
  if (member.id == 0) {
    if (!member.team->side_memory) member.team->side_memory = std::make_shared<SideMemory>();
    plan(*member.team->side_memory, products, count, a);
  }
  member.barrier();
  SideMemory& memory = *member.team->side_memory;
  const auto seen_by = [&](size_t i) -> const Activations& {
    return memory.rounding[i] == SideMemory::kOwn ? a : memory.roundings[memory.rounding[i]].activations;
  };
  prepare(member, memory, products, count, a);
  member.barrier();
  for (size_t i = 0; i < count;) {
    size_t next = i + 1;
    while (next < count && memory.rounding[next] == memory.rounding[i]) ++next;
    const bool gathers =
        memory.rounding[i] != SideMemory::kOwn && memory.roundings[memory.rounding[i]].gathers;
    if (gathers) {
      static thread_local std::vector<Product> inner;
      inner.clear();
      for (; i < next; ++i)
        inner.push_back({products[i].matrix->gathered.front().matrix, products[i].out, products[i].stride});
      plain_products(member, inner.data(), inner.size(), seen_by(i - 1), scratch);
      continue;
    }
    plain_products(member, products + i, next - i, seen_by(i), scratch);
    i = next;
  }
  for (size_t i = 0; i < count; ++i) {
    float* out = memory.of_rows.data() + memory.of_rows_starts[i];
    for (const RowsTerm& t : products[i].matrix->rows) {
      const Product some = {t.matrix, out, t.rows.size()};
      plain_products(member, &some, 1, seen_by(i), scratch);
      out += a.tokens * t.rows.size();
    }
  }
  member.barrier();  // the blocks below are shared out in another way than those above
  size_t total = 0, begin, end;
  for (size_t i = 0; i < count; ++i) total += products[i].matrix->blocks();
  member.share(total, &begin, &end);
  for (size_t i = 0, base = 0; i < count && base < end; base += products[i++].matrix->blocks()) {
    const Product& p = products[i];
    const Matrix& m = *p.matrix;
    const size_t first = begin > base ? begin - base : 0, last = std::min(m.blocks(), end - base);
    if (first >= last) continue;
    if (!m.sparse.empty()) add_sparse(p, first, last, seen_by(i), scratch);
    if (!m.columns.empty() || !m.low_rank.empty())
      add_columns(p, first, last, a, memory.projections.data() + memory.projection_starts[i], scratch);
    if (!m.entries.empty()) add_entries(p, first, last, a, scratch);
    if (!m.rows.empty()) add_rows(p, first, last, a.tokens, memory.of_rows.data() + memory.of_rows_starts[i]);
  }
}

}  // namespace

const std::vector<uint32_t>* common_exclusion(const Product* products, size_t count) {
  const std::vector<uint32_t>* common = nullptr;
  for (size_t i = 0; i < count; ++i) {
    const Matrix& m = *products[i].matrix;
    if (!m.reads_integers()) continue;
    if (m.excluded.empty() || (common && *common != m.excluded)) return nullptr;
    common = &m.excluded;
  }
  return common;
}

void matmul(const Member& member, const Product* products, size_t count, const Activations& a,
            MatmulScratch& scratch) {
  bool plain = true;
  for (size_t i = 0; i < count; ++i)
    plain = plain && !products[i].matrix->has_side_terms() && !needs_rounding(a, *products[i].matrix);
  if (plain) return plain_products(member, products, count, a, scratch);
  products_with_sides(member, products, count, a, scratch);
}

void matmul(const Member& member, const Job* jobs, size_t count, MatmulScratch& scratch) {
  bool plain = true;
  for (size_t i = 0; i < count; ++i) {
    const Matrix& m = *jobs[i].product.matrix;
    plain = plain && !m.has_side_terms() && !needs_rounding(jobs[i].activations, m);
  }
  if (plain) return plain_jobs(member, jobs, count, scratch);
  // Barriers inside: the team takes one after the other.
  for (size_t i = 0; i < count; ++i) matmul(member, &jobs[i].product, 1, jobs[i].activations, scratch);
}

}  // namespace lowbit
