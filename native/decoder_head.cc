// From the last layer to what the caller wants: logits, a sampled token, or the score of the next one.
#include "decoder_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lowbit {

// After the last attention only the rows whose logits are wanted go on; they move to the front. With few
// tokens all stay, since every member has its own stream.
void Walk::keep_wanted() {
  if (w_.redundant_ || w_.wanted_.size() == rows_) return;
  const size_t n = spec_.hidden_size, stride = w_.hidden_stride_;
  float* delta = w_.from_attention_;
  if (member_.id == 0) {
    for (size_t i = 0; i < w_.wanted_.size(); ++i) {
      std::memmove(lane_.stream.get() + i * n, lane_.stream.get() + w_.wanted_[i] * n, n * sizeof(float));
      std::memmove(delta + i * stride, delta + w_.wanted_[i] * stride, n * sizeof(float));
    }
  }
  barrier();
  rows_ = w_.wanted_.size();
  narrowed_ = true;
}

void Walk::head() {
  for (size_t first = 0; first < w_.wanted_.size(); first += kHeadRows)
    head_group(first, std::min(kHeadRows, w_.wanted_.size() - first));
}

// Wanted rows [first, first + count).
void Walk::head_group(size_t first, size_t count) {
  const size_t n = spec_.hidden_size, vocab = spec_.vocab_size;
  const std::vector<float>& bias = decoder_.layer(spec_.n_layers - 1).down_bias;
  size_t begin, end;
  own_rows(count, &begin, &end);
  for (size_t i = begin; i < end; ++i) {
    const size_t row = narrowed_ ? first + i : w_.wanted_[first + i];
    norm_row(row, w_.from_mlp_ + row * w_.hidden_stride_, bias, decoder_.final_norm(), normed_row(i, n),
             integer_row(lane_.head, i));
  }
  sync();
  const StepOutput& output = w_.output_;
  const bool kept =
      output.kind == StepOutput::Kind::last_logits || output.kind == StepOutput::Kind::all_logits;
  float* logits = kept ? output.logits + (w_.first_output_ + first) * vocab : w_.logits_.get();
  const Product product = {&decoder_.head(), logits, vocab};
  Activations present = lane_.head;
  present.tokens = count;
  matmul(member_, &product, 1, present, w_.matmul_scratch_[member_.id]);
  barrier();
  if (kept) return;

  const size_t chunks = logit_chunks(vocab);
  member_.share(count * chunks, &begin, &end);
  for (size_t i = begin; i < end; ++i)
    w_.chunks_[i] = scan_chunk(logits + i / chunks * vocab, vocab, i % chunks);
  barrier();
  member_.share(count, &begin, &end);
  for (size_t i = begin; i < end; ++i)
    finish_output(first + i, logits + i * vocab, join_chunks(&w_.chunks_[i * chunks], chunks));
  if (first + count < w_.wanted_.size()) barrier();  // the next group overwrites the logits
}

void Walk::finish_output(size_t index, float* logits, const LogitStats& stats) {
  const size_t output = w_.first_output_ + index;
  if (!std::isfinite(stats.log_sum)) {
    size_t seen = w_.bad_output_;
    while (output < seen && !w_.bad_output_.compare_exchange_weak(seen, output)) {
    }
    return;
  }
  if (w_.output_.kind == StepOutput::Kind::sample) {
    Sampler& sampler = *w_.output_.samplers[output];
    w_.output_.ids[output] = sampler.choose(logits, spec_.vocab_size, stats);
    w_.output_.values[output] = sampler.logprob();
  } else {
    const size_t target = static_cast<size_t>(w_.targets_[w_.wanted_[index]]);
    w_.output_.values[output] = static_cast<float>(logits[target] - stats.log_sum);
  }
}

}  // namespace lowbit
