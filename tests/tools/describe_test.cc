// The JSON by which a daemon describes itself. Scripts read it: keys are only ever added.
#include "tools/common/describe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tools/common/describe_text.h"

namespace kvrelay::tools {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

Description Example() {
  Description d;
  d.engine = {.engine_id = "0a",
              .incarnation = "ffff",
              .role = "decode",
              .endpoint = "tcp://127.0.0.1:7601",
              .version = "0.1.0",
              .protocol = 1,
              .model_fingerprint = "beef",
              .model_name = "tiny",
              .tp = 2,
              .pp = 1,
              .pid = 42,
              .uptime_ms = 1000,
              .ready = true,
              .draining = false};
  d.flags = {{"tp", "2", "flag"}, {"relay", "auto", "default"}};
  d.layout = {.format = "hnd",
              .dtype = "fp32",
              .layers = 4,
              .kv_heads = 2,
              .head_dim = 32,
              .block_size = 16,
              .num_blocks = 512,
              .block_stride_bytes = 4096,
              .head_stride_bytes = 2048,
              .token_stride_bytes = 128};
  d.shards = {{.rank = 1,
               .tp = 2,
               .layer_begin = 0,
               .layer_end = 4,
               .total_layers = 4,
               .head_begin = 2,
               .head_end = 4,
               .total_heads = 4}};
  d.regions = {{.rank = 0, .id = 0, .device = "cpu", .bytes = 1 << 20, .exported = "memfd"}};
  d.blocks = {.total = 512, .used = 12, .free = 500, .quarantine = 0};
  d.leases = {{.id = "aa",
               .epoch = "7f",
               .state = "claimed",
               .kind = "prefix",
               .tokens = 256,
               .blocks = 16,
               .readers = 1,
               .time_left_ms = -5}};
  d.transports = {"mapped", "no ucx-packed: not asked for"};
  d.sessions = {{.rank = 0,
                 .number = 7,
                 .state = "pulling",
                 .peer = "prefill a rank 1",
                 .tokens = 77,
                 .blocks = 5}};
  d.peers = {{.own_rank = 0,
              .engine_id = "0b",
              .incarnation = "1",
              .rank = 1,
              .endpoint = "tcp://a:1",
              .state = "ready",
              .path = "mapped",
              .why = "same host",
              .rtt_ms = 0.25}};
  d.prefixes = {{.hash = "cc", .tokens = 256, .bytes = 65536, .references = 3, .hits = 15}};
  d.prefill_workers = {{.endpoint = "tcp://a:1",
                        .state = "ready",
                        .why = "",
                        .outstanding_tokens = 99,
                        .failures = 0}};
  d.counters = {{"kvrelay_pulls_total{path=\"mapped\",outcome=\"ok\"}", 12}};
  return d;
}

TEST(Describe, WhatIsWrittenIsRead) {
  const std::string json = DescriptionToJson(Example());
  const auto back = DescriptionFromJson(json);
  ASSERT_TRUE(back) << back.error().ToString();
  EXPECT_EQ(DescriptionToJson(*back), json);
  EXPECT_EQ(back->leases[0].readers, 1U);
  EXPECT_EQ(back->leases[0].time_left_ms, -5);
}

TEST(Describe, KeysAreThoseThatScriptsRead) {
  const std::string text = DescriptionToJson(Example());
  EXPECT_THAT(text, StartsWith(R"({"schema":1,"engine":{"engine_id":"0a")"));
  const auto json = nlohmann::json::parse(text);
  EXPECT_EQ(json["engine"]["model_fingerprint"], "beef");
  EXPECT_EQ(json["flags"][0]["source"], "flag");
  EXPECT_EQ(json["layout"]["block_stride_bytes"], 4096);
  EXPECT_EQ(json["shards"][0]["head_end"], 4);
  EXPECT_EQ(json["regions"][0]["exported"], "memfd");
  EXPECT_EQ(json["blocks"]["quarantine"], 0);
  EXPECT_EQ(json["leases"][0]["time_left_ms"], -5);
  EXPECT_EQ(json["sessions"][0]["number"], 7);
  EXPECT_EQ(json["peers"][0]["rtt_ms"], 0.25);
  EXPECT_EQ(json["prefixes"][0]["references"], 3);
  EXPECT_EQ(json["prefill_workers"][0]["outstanding_tokens"], 99);
  EXPECT_EQ(json["counters"]["kvrelay_pulls_total{path=\"mapped\",outcome=\"ok\"}"], 12);
}

TEST(Describe, EmptyListsAreWritten) {
  const auto json = nlohmann::json::parse(DescriptionToJson({}));
  EXPECT_TRUE(json["leases"].is_array());
  EXPECT_TRUE(json["counters"].is_object());
}

TEST(Describe, OtherVersionsAreUnderstood) {
  const auto d =
      DescriptionFromJson(R"({"schema":1,"engine":{"role":"prefill","new":[1]},"x":{}})");
  ASSERT_TRUE(d) << d.error().ToString();
  EXPECT_EQ(d->engine.role, "prefill");
  EXPECT_EQ(d->blocks.total, 0U);
}

TEST(Describe, PeopleGetTablesOfWhatThereIs) {
  const std::string text = DescriptionText(Example(), false);
  EXPECT_THAT(text, HasSubstr("decode engine 0a  tcp://127.0.0.1:7601  ready, up 1 s\n"));
  EXPECT_THAT(text, HasSubstr("  blocks: 12 used, 500 free, 0 in quarantine, 512 in all\n"));
  EXPECT_THAT(text, HasSubstr("  1 of 2  0-3 of 4  2-3 of 4\n"));
  EXPECT_THAT(text, HasSubstr("claimed     256      16        1       over  7f\n"));
  EXPECT_THAT(text, HasSubstr("  --tp     2      flag\n"));
  Description idle = Example();
  idle.leases.clear();
  EXPECT_THAT(DescriptionText(idle, false), Not(HasSubstr("leases")));
}

TEST(Describe, AWrongTypeIsNamed) {
  const auto d = DescriptionFromJson(R"({"leases":[{"tokens":"many"}]})");
  ASSERT_FALSE(d);
  EXPECT_EQ(d.error().code(), Code::kInvalidArgument);
  EXPECT_THAT(d.error().message(), HasSubstr("leases: tokens: "));
  EXPECT_FALSE(DescriptionFromJson("{"));
  EXPECT_FALSE(DescriptionFromJson(R"({"engine":7})"));
  EXPECT_FALSE(DescriptionFromJson(R"({"peers":{}})"));
}

}  // namespace
}  // namespace kvrelay::tools
