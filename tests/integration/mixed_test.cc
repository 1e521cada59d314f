// Prefill and decode daemons that have nothing in common but the model: ranks, stages, block sizes,
// paged and virtual caches, layouts, dtypes. The tokens are those that one process computes. Each
// pair of two factors' values comes up here; suites named Full try all shapes.
#include <array>
#include <map>
#include <set>
#include <utility>

#include "kvcache/kv_view.h"
#include "tests/integration/direct.h"
#include "tests/integration/generator.h"
#include "tests/integration/handoff.h"
#include "tests/integration/harness.h"

namespace kvrelay::integration {
namespace {

struct Ranks {
  int count;
  Args flags;
};
// The model has 6 layers and 4 KV heads.
const std::array<Ranks, 4> kRanks = {{{1, {}},
                                      {2, {"--tp=2"}},
                                      {4, {"--pp=4"}},  // 2, 2, 1 and 1 layers
                                      {6, {"--tp=2", "--pp=3", "--pp_layers=1,4,1"}}}};
constexpr std::array<int, 5> kBlockSizes = {8, 16, 24, 100, 256};
constexpr std::array<const char*, 2> kCaches = {"paged", "virtual"};
constexpr std::array<const char*, 2> kLayouts = {"nhd", "hnd"};
constexpr std::array<DType, 6> kDTypes = {DType::kFp32,    DType::kFp16,    DType::kBf16,
                                          DType::kFp8E4m3, DType::kFp8E5m2, DType::kInt8};
constexpr std::array<const char*, 2> kTransports = {"mapped", "ucx-packed"};
constexpr std::array<size_t, 7> kLengths = {1, 7, 16, 33, 100, 129, 250};
constexpr uint32_t kNewTokens = 24;

enum Factor : size_t {
  kPrefillRanks,
  kDecodeRanks,
  kPrefillBlock,
  kDecodeBlock,
  kPrefillCache,
  kDecodeCache,
  kPrefillLayout,
  kDecodeLayout,
  kPrefillDType,
  kDecodeDType,
  kTransport,
  kSystem,
  kStream,
  kFactors
};
constexpr std::array<size_t, kFactors> kValues = {kRanks.size(),
                                                  kRanks.size(),
                                                  kBlockSizes.size(),
                                                  kBlockSizes.size(),
                                                  kCaches.size(),
                                                  kCaches.size(),
                                                  kLayouts.size(),
                                                  kLayouts.size(),
                                                  kDTypes.size(),
                                                  kDTypes.size(),
                                                  kTransports.size(),
                                                  kSystemLengths.size(),
                                                  2};
using Config = std::array<size_t, kFactors>;  // the index of each factor's value

// Every pair of two factors' values is in some row. Greedy: each row begins with a pair that is
// missing, and takes for the other factors what brings most.
std::vector<Config> PairwiseRows() {
  using Pair = std::array<size_t, 4>;  // factor, value, later factor, value
  std::set<Pair> missing;
  for (size_t a = 0; a < kFactors; ++a) {
    for (size_t b = a + 1; b < kFactors; ++b) {
      for (size_t i = 0; i < kValues[a]; ++i) {
        for (size_t j = 0; j < kValues[b]; ++j) missing.insert({a, i, b, j});
      }
    }
  }
  std::vector<Config> rows;
  while (!missing.empty()) {
    const auto [a, i, b, j] = *missing.begin();
    std::map<size_t, size_t> row = {{a, i}, {b, j}};
    for (size_t factor = 0; factor < kFactors; ++factor) {
      if (row.contains(factor)) continue;
      size_t best = 0;
      size_t most = 0;
      for (size_t n = 0; n < kValues[factor]; ++n) {
        const size_t value = (n + rows.size()) % kValues[factor];  // of equals in turn
        size_t brings = 1;
        for (const auto& [other, its] : row) {
          brings += missing.count(other < factor ? Pair{other, its, factor, value}
                                                 : Pair{factor, value, other, its});
        }
        if (brings > most) {
          most = brings;
          best = value;
        }
      }
      row[factor] = best;
    }
    Config config{};
    for (const auto& [factor, value] : row) config[factor] = value;
    for (size_t x = 0; x < kFactors; ++x) {
      for (size_t y = x + 1; y < kFactors; ++y) missing.erase({x, config[x], y, config[y]});
    }
    rows.push_back(config);
  }
  return rows;
}

// In a sanitizer build every value of every factor comes up.
std::vector<Config> Rows() {
  if (Slowness() == 1) return PairwiseRows();
  std::vector<Config> rows;
  for (size_t row = 0; row < 6; ++row) {
    Config& config = rows.emplace_back();
    for (size_t factor = 0; factor < kFactors; ++factor) {
      config[factor] = (row + factor) % kValues[factor];
    }
  }
  return rows;
}

class Mixed : public Story {
 protected:
  static Args Flags(const Config& config, Factor ranks, Factor block, Factor cache, Factor layout,
                    Factor dtype) {
    Args flags = {"--block_size=" + std::to_string(kBlockSizes[config[block]]),
                  std::string("--kv_cache=") + kCaches[config[cache]],
                  std::string("--kv_layout=") + kLayouts[config[layout]],
                  "--kv_dtype=" + std::string(DTypeName(kDTypes[config[dtype]])),
                  std::string("--transport=") + kTransports[config[kTransport]],
                  "--kv_blocks=64MiB"};
    flags.insert(flags.end(), kRanks[config[ranks]].flags.begin(),
                 kRanks[config[ranks]].flags.end());
    return flags;
  }
  static std::string Text(const Args& args) {
    std::string text;
    for (const std::string& arg : args) text += arg + " ";
    return text;
  }

  void Check(const Config& config) {
    const Args of_prefill =
        Flags(config, kPrefillRanks, kPrefillBlock, kPrefillCache, kPrefillLayout, kPrefillDType);
    Args of_decode =
        Flags(config, kDecodeRanks, kDecodeBlock, kDecodeCache, kDecodeLayout, kDecodeDType);
    if (config[kStream] == 1) of_decode.push_back("--stream_pulls=false");
    const size_t system = kSystemLengths[config[kSystem]];
    SCOPED_TRACE("prefill " + Text(of_prefill) + "; decode " + Text(of_decode) +
                 "; system prompt of " + std::to_string(system));
    Daemon& prefill = StartPrefill(of_prefill);
    Daemon& decode = StartDecode({&prefill}, of_decode);
    ASSERT_TRUE(prefill.started() && decode.started());

    const DType prefill_dtype = kDTypes[config[kPrefillDType]];
    const DType decode_dtype = kDTypes[config[kDecodeDType]];
    const bool exact = prefill_dtype == DType::kFp32 && decode_dtype == DType::kFp32;
    // Ranks add up their parts in another order than one process does: sums differ by 1e-6 of
    // themselves. Where the cache is fp32 that shows in no token of these texts. A narrow cache now
    // and then rounds such a sum to the neighbouring number, 2^-8 (bf16) or 2^-11 away, in one of
    // thousands of terms; two tokens whose logits are as close as that moves them are a draw.
    constexpr float kDraw = 0.02F;
    const std::vector<proto::Generate> requests = GreedyOfLengths(kLengths, system, kNewTokens);
    const auto replies = AskAll(decode.endpoint(), requests, requests.size());
    Handoff handoff(BundledModel(), prefill_dtype, decode_dtype);
    for (size_t i = 0; i < requests.size(); ++i) {
      ASSERT_TRUE(replies[i].has_value()) << replies[i].error().ToString();
      EXPECT_EQ(replies[i]->summary["kv"]["path"], kTransports[config[kTransport]]);
      ASSERT_EQ(replies[i]->token_ids.size(), kNewTokens);
      const float regret = handoff.Regret(requests[i], replies[i]->token_ids);
      EXPECT_LE(regret, exact ? 0 : kDraw) << "prompt of " << kLengths[i];
    }
    ExpectIdle(prefill);
    ExpectIdle(decode);
    prefill.Kill();
    decode.Kill();
  }
};

class MixedRow : public Mixed, public ::testing::WithParamInterface<size_t> {};

TEST_P(MixedRow, GivesTheTokensOfOneProcess) { Check(Rows().at(GetParam())); }

INSTANTIATE_TEST_SUITE_P(Pairwise, MixedRow, ::testing::Range<size_t>(0, Rows().size()));

// All shapes over both transports; the other factors in turn.
class FullMixed : public Mixed {};

TEST_F(FullMixed, EveryShape) {
  size_t turn = 0;
  Config config{};
  for (config[kPrefillRanks] = 0; config[kPrefillRanks] < kRanks.size(); ++config[kPrefillRanks]) {
    for (config[kDecodeRanks] = 0; config[kDecodeRanks] < kRanks.size(); ++config[kDecodeRanks]) {
      for (size_t blocks = 0; blocks < kBlockSizes.size() * kBlockSizes.size(); ++blocks, ++turn) {
        config[kPrefillBlock] = blocks / kBlockSizes.size();
        config[kDecodeBlock] = blocks % kBlockSizes.size();
        for (const size_t factor : {kPrefillCache, kDecodeCache, kPrefillLayout, kDecodeLayout,
                                    kPrefillDType, kDecodeDType, kSystem, kStream}) {
          config[factor] = (turn * (factor + 1) + turn / 7) % kValues[factor];
        }
        for (config[kTransport] = 0; config[kTransport] < kTransports.size();
             ++config[kTransport]) {
          Check(config);
        }
      }
    }
  }
}

// By layer, head, token, K or V.
using KvRows = std::map<std::array<uint32_t, 4>, std::vector<std::byte>>;

// What a daemon's ranks hold of tokens [0, count) of the first request that it got.
void ReadFirstRequest(const Daemon& daemon, const std::string& run_dir,
                      const std::vector<proto::ClaimRank>& ranks, uint32_t count, KvRows& rows) {
  DirectReader reader(daemon.endpoint());
  for (const proto::ClaimRank& rank : ranks) {
    const auto meta = reader.GetMeta(rank);
    ASSERT_TRUE(meta.has_value()) << meta.error().ToString();
    const uint32_t size = meta->layout.block_size;
    // A fresh pool gives its blocks in order.
    KvTable table;
    for (BlockId block = 0; block * size < count; ++block) table.blocks.push_back(block);
    DirectMapping mapping(*meta, run_dir);
    ASSERT_TRUE(mapping.status().ok()) << mapping.status().ToString();
    mapping.Read({.tables = {table}, .first_token = 0, .tokens = count, .ranks = {}, .ttl_ms = 0},
                 rank);
    std::vector<std::byte> memory = mapping.memory();
    const KvView view(meta->layout, {memory.data()});
    for (uint32_t layer = 0; layer < meta->shard.layer_count; ++layer) {
      for (uint32_t head = 0; head < meta->shard.head_count; ++head) {
        for (uint32_t token = 0; token < count; ++token) {
          const auto add = [&](uint32_t v, const std::byte* row) {
            rows[{meta->shard.layer_begin + layer, meta->shard.head_begin + head, token, v}].assign(
                row, row + meta->layout.row_bytes());
          };
          add(0, view.K(layer, token / size, head, token % size));
          add(1, view.V(layer, token / size, head, token % size));
        }
      }
    }
  }
}

TEST_F(Mixed, WithoutACastNotABitOfTheKvChanges) {
  for (const DType dtype : kDTypes) {
    SCOPED_TRACE(DTypeName(dtype));
    const std::string type = "--kv_dtype=" + std::string(DTypeName(dtype));
    Daemon& prefill = StartPrefill(
        {type, "--tp=2", "--pp=3", "--block_size=24", "--kv_layout=hnd", "--kv_blocks=16MiB"});
    Daemon& decode = StartDecode({&prefill}, {type, "--block_size=100", "--kv_blocks=16MiB"});
    constexpr uint32_t kTokens = 333;
    const auto reply = Ask(decode.endpoint(), Greedy({}, integration::Text(kTokens, 1), 1));
    ASSERT_TRUE(reply.has_value()) << reply.error().ToString();
    // Its ranks' endpoints are in any claim.
    DirectReader reader(prefill.endpoint());
    const auto ticket = reader.Prefill(Tokens(20));
    ASSERT_TRUE(ticket.has_value());
    const auto claim = reader.Claim(*ticket);
    ASSERT_TRUE(claim.has_value());
    ASSERT_EQ(claim->ranks.size(), 6U);
    // The last token is run again on the decode side.
    KvRows there;
    ReadFirstRequest(prefill, run_dir(), claim->ranks, kTokens - 1, there);
    proto::ClaimRank front;
    front.endpoint = decode.endpoint();
    KvRows here;
    ReadFirstRequest(decode, run_dir(), {front}, kTokens - 1, here);
    EXPECT_EQ(here.size(), 6U * 4 * (kTokens - 1) * 2);
    EXPECT_TRUE(here == there);
    EXPECT_TRUE(reader.Release(*ticket).ok());
    prefill.Kill();
    decode.Kill();
  }
}

TEST_F(Mixed, AVirtualCacheHasMemoryForWhatItHolds) {
  Daemon& prefill = StartPrefill({"--kv_cache=virtual"});
  Daemon& decode = StartDecode({&prefill}, {"--kv_cache=virtual", "--kv_page_size=128KiB"});
  ASSERT_TRUE(prefill.started() && decode.started());
  EXPECT_EQ(Inspect(decode)["counters"]["kvrelay_kv_optimized_memory_mb"], 0);
  ASSERT_TRUE(Ask(decode.endpoint(), Greedy({}, integration::Text(200, 1), 30)).has_value());
  for (const Daemon* daemon : {&prefill, &decode}) {
    SCOPED_TRACE(daemon->name());
    ExpectIdle(*daemon);
    const Json counters = Inspect(*daemon)["counters"];
    const auto metric = [&](const std::string& name) {
      return counters["kvrelay_kv_" + name].get<double>();
    };
    EXPECT_GE(metric("optimized_memory_mb"), 200 * 6.0 / 1024) << "6 KiB a token";
    EXPECT_LE(metric("optimized_memory_mb"), 2);
    EXPECT_EQ(metric("memory_saved_mb"),
              metric("baseline_memory_mb") - metric("optimized_memory_mb"));
    EXPECT_EQ(metric("cached_mb"), metric("optimized_memory_mb")) << "for the next request";
    EXPECT_EQ(metric("utilization"), 0);
  }
}

TEST_F(Mixed, AnotherModelIsRefusedWithBothSidesValues) {
  Daemon& prefill = StartPrefill({"--model=" KVRELAY_SOURCE_DIR "/tests/engine/data/tiny-gqa"});
  Daemon& decode = StartDecode({&prefill});
  const auto reply = Ask(decode.endpoint(), Greedy({}, Tokens(20), 1));
  ASSERT_FALSE(reply.has_value());
  EXPECT_EQ(CodeName(reply.error().code()), "kIncompatible") << reply.error().ToString();
  for (const char* value : {"2 layers x 2 KV heads x 8", "6 layers x 4 KV heads x 32"}) {
    EXPECT_NE(reply.error().message().find(value), std::string::npos) << reply.error().ToString();
  }
}

}  // namespace
}  // namespace kvrelay::integration
