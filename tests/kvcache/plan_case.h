// One case of the planner's randomised test: a model, an owner engine, one rank of a reader engine,
// and what it pulls, as a handful of small numbers. Any numbers make a case (they are cut to what
// goes together), so that a failing one can be made smaller number by number, and written down in
// one line.
#pragma once

#include <cstdint>
#include <string>

#include "tests/kvcache/seed.h"

namespace kvrelay::testing_support {

// Name, and the largest value that is drawn.
#define KVRELAY_PLAN_CASE_FIELDS(F)                                                           \
  F(mla, 5)           /* 1: MLA */                                                            \
  F(opaque, 9)        /* 1: opaque pages for K and for V; 2: for both together */             \
  F(layers, 4)        /* of the model */                                                      \
  F(owner_cuts, 15)   /* bit i: a pipeline stage of the owner ends behind layer i */          \
  F(reader_begin, 3)  /* first layer of the reader's rank */                                  \
  F(reader_layers, 4) /* their number */                                                      \
  F(kinds, 31)        /* bit i: layer i is of the second kind; 16 and more: one kind only */  \
  F(heads, 6)         /* of the model */                                                      \
  F(other_heads, 6)   /* of the second kind's head group; 4 and more: the same group */       \
  F(window, 40)       /* of the second kind; 20 and more: none */                             \
  F(owner_window, 9)  /* that many tokens more; 7 and more: all */                            \
  F(owner_tp, 16)                                                                             \
  F(reader_tp, 16)                                                                            \
  F(reader_rank, 15)                                                                          \
  F(dim, 40)          /* of a head; 24 and more: 32 */                                        \
  F(owner_block, 9)   /* tokens */                                                            \
  F(reader_block, 12) /* 10 and more: as the owner's */                                       \
  F(other_block, 12)  /* of the second kind on the owner's side; 10 and more: as the first */ \
  F(begin, 30)        /* of the range pulled */                                               \
  F(tokens, 40)       /* pulled */                                                            \
  F(owner_first, 4)   /* blocks that the owner's table has before the range */                \
  F(reader_first, 4)                                                                          \
  F(owner_type, 11)  /* dtype; 6 and more: bf16 */                                            \
  F(reader_type, 14) /* 6 and more: as the owner's */                                         \
  F(owner_scales, 7) /* 0: per tensor; 1: per head; 2: per head, of the request; else none */ \
  F(reader_scales, 7)                                                                         \
  F(owner_layout,                                                                             \
    9999) /* order, padding, regions; 0: NHD, 1: HND, 2: [block, head, token, K|V] */         \
  F(reader_layout, 9999)                                                                      \
  F(chunk, 7)      /* the packed stream's chunks: larger, fewer */                            \
  F(content, 9999) /* bytes, tables, scales */

struct PlanCase {
#define KVRELAY_FIELD(name, most) uint32_t name = 0;
  KVRELAY_PLAN_CASE_FIELDS(KVRELAY_FIELD)
#undef KVRELAY_FIELD

  static PlanCase Random(testing_support::Random& random);
  // "mla=0 opaque=0 ...", of the numbers that are not 0; and back. Unknown names are ignored.
  static PlanCase Parse(const std::string& line);
  std::string ToString() const;
};

// Plans the pulls of the case from every source, both one-sided and packed, carries them out, and
// compares all of the reader's memory with what one element at a time by the layouts' address
// formula gives. Empty when it is right, or what is wrong.
std::string CheckPlanCase(const PlanCase& wanted);

// The smallest case found for which Check still fails.
PlanCase ShrinkPlanCase(PlanCase failing);

}  // namespace kvrelay::testing_support
