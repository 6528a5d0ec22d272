// The MLP of a sparse layer: every token goes through the experts that its router chooses.
//
// Experts take their turn in waves of so many that their tokens fill a buffer. Within a wave all experts are
// shared out together: only chosen experts are read, each once for all of its tokens.
//
//   few tokens   5 barriers per layer: members route and round for themselves
//   many tokens  3 barriers and 4 for each wave
#include <algorithm>

#include "decoder_step.h"

namespace lowbit {
namespace {

const float* data_or_null(const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

// The products of experts [first, last) of the plan, pair `base` being row 0 of `out`.
// input: makes the activations of an expert from its first pair and their number.
template <typename Input>
void add_jobs(const ExpertPlan& plan, size_t first, size_t last, const ExpertLayer& layer,
              const Matrix* Expert::* field, float* out, size_t stride, Input input, std::vector<Job>* jobs) {
  const size_t base = plan.starts[first];
  for (size_t i = first; i < last; ++i) {
    const size_t start = plan.starts[i], count = plan.starts[i + 1] - start;
    const Matrix* matrix = layer.experts[plan.experts[i]].*field;
    jobs->push_back({{matrix, out + (start - base) * stride, stride}, input(start, count)});
  }
}

}  // namespace

// Leaves in from_mlp() what the experts add to the stream; the normed rows are in lane_.hidden.
void Walk::expert_half(const ExpertLayer& layer) {
  ExpertMemory& memory = w_.experts_;
  const Router router = spec_.router();
  const size_t k = router.per_token, stride = memory.router_stride;
  const Product scores = {layer.router, memory.scores.get(), stride};
  product(&scores, 1, lane_.hidden);
  barrier();
  size_t begin, end;
  own_rows(rows_, &begin, &end);
  // Members of the few-token way share the scores, so each changes a copy.
  std::vector<float>& copy = memory.copies[member_.id];
  for (size_t row = begin; row < end; ++row) {
    const float* own = memory.scores.get() + row * stride;
    copy.assign(own, own + router.n_experts);
    route(router, copy.data(), data_or_null(layer.router_bias), lane_.chosen.data() + row * k,
          lane_.shares.get() + row * k);
  }
  sync();
  ExpertPlan& plan = memory.plans[member_.id];
  plan.make(lane_.chosen.data(), rows_, router);
  for (size_t first = 0, last; first < plan.experts.size(); first = last) {
    last = plan.wave(first, memory.rows);
    expert_wave(layer, plan, first, last);
  }
  sync();
}

// Experts [first, last) of the plan.
void Walk::expert_wave(const ExpertLayer& layer, const ExpertPlan& plan, size_t first, size_t last) {
  ExpertMemory& memory = w_.experts_;
  const size_t base = plan.starts[first], stop = plan.starts[last], n = spec_.expert_size;
  const size_t stride = memory.inner_stride, k = spec_.experts_per_token;
  size_t begin, end;
  own_rows(stop - base, &begin, &end);
  if (!w_.redundant_) {
    float* values = memory.reads_values ? memory.values.get() : nullptr;
    for (size_t i = begin; i < end; ++i)
      copy_row(lane_.hidden, plan.rows[base + i], memory.gathered, i, values);
    barrier();
  }
  // The tokens of an expert are consecutive where there are only two.
  const auto input = [&](size_t start, size_t count) {
    return w_.redundant_ ? rows_of(lane_.hidden, plan.rows[start], count)
                         : rows_of(memory.gathered, start - base, count);
  };
  std::vector<Job>& jobs = memory.jobs[member_.id];
  jobs.clear();
  add_jobs(plan, first, last, layer, &Expert::gate, memory.gate.get(), stride, input, &jobs);
  add_jobs(plan, first, last, layer, &Expert::up, memory.up.get(), stride, input, &jobs);
  matmul(member_, jobs.data(), jobs.size(), w_.matmul_scratch_[member_.id]);
  barrier();

  for (size_t i = first, row = begin; row < end; ++row) {
    while (base + row >= plan.starts[i + 1]) ++i;
    const Expert& e = layer.experts[plan.experts[i]];
    float* out = lane_.expert_rows.get() + (memory.inner_floats ? row : member_.id) * n;
    const IntegerRow integers = integer_row(lane_.expert_inner, row);
    kernels_.activate(spec_.activation, memory.gate.get() + row * stride, data_or_null(e.gate_bias),
                      memory.up.get() + row * stride, data_or_null(e.up_bias), n, out,
                      e.down->reads_integers() ? &integers : nullptr);
  }
  sync();
  jobs.clear();
  const auto inner = [&](size_t start, size_t count) {
    return rows_of(lane_.expert_inner, start - base, count);
  };
  add_jobs(plan, first, last, layer, &Expert::down, memory.down.get(), w_.hidden_stride_, inner, &jobs);
  matmul(member_, jobs.data(), jobs.size(), w_.matmul_scratch_[member_.id]);
  barrier();

  own_rows(rows_, &begin, &end);
  for (size_t row = begin; row < end; ++row) {
    float* sum = expert_sum() + row * w_.hidden_stride_;
    for (size_t i = row * k; i < (row + 1) * k; ++i) {
      const size_t place = plan.places[i];
      if (place < base || place >= stop) continue;
      const Expert& e = layer.experts[lane_.chosen[i]];
      kernels_.add_weighted(sum, memory.down.get() + (place - base) * w_.hidden_stride_,
                            data_or_null(e.down_bias), lane_.shares.get()[i], spec_.hidden_size,
                            i == row * k);
    }
  }
}

// Takes the memory of a pass of `tokens`.
void ExpertMemory::lay_out(const DecoderSpec& spec, size_t tokens, size_t hidden_stride, size_t members,
                           bool redundant, size_t most, std::vector<std::unique_ptr<Lane>>& lanes) {
  const size_t k = spec.experts_per_token, n = spec.expert_size;
  const int limbs = spec.activation_bits / 8;
  rows = std::min(tokens * k, std::max(tokens, most));
  scores.grow(tokens * router_stride);
  gate.grow(rows * inner_stride);
  up.grow(rows * inner_stride);
  down.grow(rows * hidden_stride);
  if (!redundant) {
    if (reads_values) values.grow(rows * spec.hidden_size);
    gathered = gathered_memory.prepare(rows, spec.hidden_size, limbs, values.get());
  }
  if (plans.size() < members) {
    plans.resize(members);
    jobs.resize(members);
    copies.resize(members);
  }
  for (size_t i = 0; i < (redundant ? members : 1); ++i) {
    Lane& lane = *lanes[i];
    lane.chosen.resize(std::max(lane.chosen.size(), tokens * k));
    lane.shares.grow(tokens * k);
    if (redundant) lane.mixed.grow(tokens * hidden_stride);
    float* inner = lane.expert_rows.grow((inner_floats ? rows : members) * n);
    lane.expert_inner = lane.expert_memory.prepare(rows, n, limbs, inner);
  }
}

}  // namespace lowbit
