// A block of 32 rows of a code term, unpacked once to meet many tokens: where its parts lie in memory.
#pragma once

#include "matrix.h"

namespace lowbit {

// Weights as signed bytes: level - zero_point (times the multiplier), so that the product of many tokens
// knows neither widths nor tables. Where these do not fit a byte the panel is *wide*: it holds w with level -
// zero_point = step * w + correction instead, with a correction for each row and group.
struct Panel {
  struct Head {
    bool wide;
    int32_t step;  // wide only
    int32_t peak;  // no |w| is larger
  };
  Head* head;
  float* scales;         // [groups][32], times the term's unit
  float* offsets;        // [groups][32], terms with offsets only
  int32_t* corrections;  // [groups][32], wide panels only
  int8_t* weights[2];    // [steps][32 rows][4]; the second one is the low limb of table2
  int32_t* starts[2];    // [segments][32]: -128 times the sum of a segment's w, see signed_dot.h
};

constexpr size_t kPanelAlign = 64;

// Parts of the panel of a term over `padded` inputs, from `memory`, which is aligned. Returns the bytes
// taken; a null `memory` only counts.
inline size_t lay_out_panel(const CodeTerm& t, size_t padded, uint8_t* memory, Panel* panel) {
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    uint8_t* const part = memory + at;
    at += round_up(bytes, kPanelAlign);
    return part;
  };
  const size_t limbs = t.map == Map::table2 ? 2 : 1, rows = kBlockRows * sizeof(float);
  Panel p = {};
  p.head = reinterpret_cast<Panel::Head*>(take(sizeof(Panel::Head)));
  p.scales = reinterpret_cast<float*>(take(t.groups * rows));
  if (t.offsets) p.offsets = reinterpret_cast<float*>(take(t.groups * rows));
  p.corrections = reinterpret_cast<int32_t*>(take(t.groups * rows));
  for (size_t limb = 0; limb < limbs; ++limb) {
    p.weights[limb] = reinterpret_cast<int8_t*>(take(padded * kBlockRows));
    p.starts[limb] =
        reinterpret_cast<int32_t*>(take(padded / kSumStride * rows));  // segments hold 16 or more
  }
  if (panel) *panel = p;
  return at;
}

}  // namespace lowbit
