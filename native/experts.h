// Mixtures of experts: the weights of a sparse layer, which experts a token takes, and which tokens an expert
// has.
//
// A router gives every token a score for each expert; the best few take the token, and what they return is
// added up with weights, always in ascending order of the experts, so that a token's result does not depend
// on its companions. Sources: arXiv:2101.03961, arXiv:2401.04088.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "matrix.h"

namespace lowbit {

// Are the weights a softmax over all experts of which the best are taken, or one over the best alone?
enum class RouterOrder : uint8_t { softmax_topk, topk_softmax };

// Matrices belong to the caller; vectors are copies, empty where the network has none.
struct Expert {
  const Matrix *gate = nullptr, *up = nullptr, *down = nullptr;
  std::vector<float> gate_bias, up_bias, down_bias;
};

struct ExpertLayer {
  const Matrix* router = nullptr;
  std::vector<float> router_bias;
  std::vector<Expert> experts;  // empty: the layer has one MLP for all tokens
  // The place of matrix or vector "router", "router_bias", "experts.J.gate" and so on; null: no such thing.
  const Matrix** matrix(const std::string& field);
  std::vector<float>* vector(const std::string& field);
};

struct Router {
  size_t n_experts;
  size_t per_token;
  RouterOrder order;
  bool renormalize;  // softmax_topk: weights are scaled to a sum of 1
};

// The experts of one token in ascending order and their weights, [per_token] each. Of equal scores the lower
// index is taken; NaN is never better than a number. scores: [n_experts], changed; bias may be null.
void route(const Router& router, float* scores, const float* bias, uint32_t* chosen, float* weights);

// Pairs of a token and an expert, sorted by expert, then by token.
struct ExpertPlan {
  std::vector<uint32_t> experts;  // that have tokens, ascending
  std::vector<size_t> starts;     // [experts + 1], where the pairs of each begin
  std::vector<uint32_t> rows;     // token of each pair
  std::vector<size_t> places;     // [tokens][per_token], where the pair of each choice is

  // chosen: [tokens][per_token], each ascending.
  void make(const uint32_t* chosen, size_t tokens, const Router& router);
  // The end of a wave of experts from `first` on that have at most `rows` pairs together, or of one.
  size_t wave(size_t first, size_t rows) const;

 private:
  std::vector<size_t> next_;  // [n_experts]
};

// Rows [first, first + count) of activations.
Activations rows_of(const Activations& a, size_t first, size_t count);
// Row `to` of b = row `from` of a: integers, and floats to values + to * in_features where values is not
// null.
void copy_row(const Activations& a, size_t from, const Activations& b, size_t to, float* values);

}  // namespace lowbit
