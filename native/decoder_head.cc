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
  const DecoderLayer& last_layer = decoder_.layer(spec_.n_layers - 1);
  size_t begin, end;
  own_rows(count, &begin, &end);
  for (size_t i = begin; i < end; ++i) {
    const size_t row = narrowed_ ? first + i : w_.wanted_[first + i];
    enter_row(row,
              {from_mlp(spec_.n_layers - 1) + row * w_.hidden_stride_, last_layer.down_bias,
               last_layer.mlp_out_norm, decoder_.final_norm(), decoder_.final_norm_bias()},
              normed_row(i, n), integer_row(lane_.head, i));
  }
  sync();
  clock_.end(Phase::norms);
  float* kept = w_.output_.logits;
  float* logits = kept ? kept + (w_.first_output_ + first) * vocab : w_.logits_.get();
  const Product product = {&decoder_.head(), logits, vocab};
  Activations present = lane_.head;
  present.tokens = count;
  matmul(member_, &product, 1, present, w_.matmul_scratch_[member_.id]);
  barrier();
  clock_.end(Phase::head);
  if (kept && spec_.logit_softcap == 0) return;

  const size_t chunks = logit_chunks(vocab);
  member_.share(count * chunks, &begin, &end);
  if (spec_.logit_softcap != 0)
    for (size_t i = begin; i < end; ++i) {
      const size_t at = i % chunks * kLogitChunk, size = std::min(kLogitChunk, vocab - at);
      kernels_.softcap(logits + i / chunks * vocab + at, size, spec_.logit_softcap);
    }
  if (kept) return;
  for (size_t i = begin; i < end; ++i)
    w_.chunks_[i] = scan_chunk(logits + i / chunks * vocab, vocab, i % chunks);
  barrier();
  for (size_t i = member_.id; i < w_.tasks_.size(); i += member_.count) {
    const RowTask& task = w_.tasks_[i];
    const size_t run_end = w_.ends_[task.run], drafts = (*w_.runs_)[task.run].drafts;
    const size_t last = std::min(first + count, task.first + task.count);
    for (size_t k = std::max(first, task.first); k < last; ++k) {
      const size_t token = w_.first_token_ + w_.wanted_[k];
      float* row = logits + (k - first) * vocab;
      const LogitStats stats = join_chunks(&w_.chunks_[(k - first) * chunks], chunks);
      if (token + 1 + drafts < run_end)
        score_row(task.run, token, row, stats);
      else if (!sample_row(task.run, token, row, stats))
        break;
    }
  }
  if (first + count < w_.wanted_.size()) barrier();  // the next group overwrites the logits
  clock_.end(Phase::choose);
}

// Samples after `token` if the run has been guessed right up to there; false if it has ended.
bool Walk::sample_row(size_t index, size_t token, float* logits, const LogitStats& stats) {
  const Run& run = (*w_.runs_)[index];
  StepRun& result = w_.output_.results[index];
  const size_t turn = token + 1 + run.drafts - w_.ends_[index];
  if (result.ids.size() != turn || !std::isfinite(stats.log_sum)) return false;
  if (turn > 0) {
    if (result.ids.back() != (*w_.tokens_)[token]) return false;
    run.sampler->commit();
  }
  const uint32_t* mask = run.masks ? run.masks + turn * mask_words(spec_.vocab_size) : nullptr;
  const int32_t id = run.sampler->choose(logits, spec_.vocab_size, stats, mask);
  if (id < 0) return false;
  result.ids.push_back(id);
  result.logprobs.push_back(run.sampler->logprob());
  result.tops.push_back(run.sampler->top());
  return true;
}

void Walk::score_row(size_t index, size_t token, const float* logits, const LogitStats& stats) {
  const Run& run = (*w_.runs_)[index];
  StepRun& result = w_.output_.results[index];
  const size_t place = token + run.count - w_.ends_[index];
  if (!std::isfinite(stats.log_sum)) {
    result.scores[place] = std::nanf("");
    return;
  }
  const size_t target = static_cast<size_t>((*w_.tokens_)[token + 1]);
  result.scores[place] = static_cast<float>(logits[target] - stats.log_sum);
  if (run.scores > 0)
    result.score_tops[place] =
        w_.scorers_[member_.id]->likeliest(logits, spec_.vocab_size, stats, static_cast<size_t>(run.scores));
}

}  // namespace lowbit
