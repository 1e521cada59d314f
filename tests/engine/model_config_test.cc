#include "engine/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "engine/model.h"
#include "engine_testing.h"

namespace kvrelay::engine {
namespace {

using nlohmann::json;
using testing::HasSubstr;

json Version4() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "tie_word_embeddings": true, "bos_token_id": 0, "eos_token_id": 1})");
}

json Version5() {
  json config = Version4();
  config["dtype"] = config["torch_dtype"];
  config["rope_parameters"] = config["rope_scaling"];
  config["rope_parameters"]["rope_theta"] = config["rope_theta"];
  for (const char* old : {"torch_dtype", "rope_scaling", "rope_theta"}) config.erase(old);
  return config;
}

Result<ModelConfig> Parse(const json& config, const std::string& generation = {}) {
  return ParseModelConfig(config.dump(), "config.json", generation);
}

TEST(ModelConfigTest, BothSpellingsMeanTheSame) {
  const auto four = Parse(Version4());
  const auto five = Parse(Version5());
  ASSERT_TRUE(four) << four.error().ToString();
  ASSERT_TRUE(five) << five.error().ToString();
  EXPECT_EQ(*four, *five);
  EXPECT_EQ(four->Canonical(), five->Canonical());
  EXPECT_EQ(four->rope.type, RopeConfig::Type::kLlama3);
  EXPECT_EQ(four->rope.theta, 500000.0);
  EXPECT_EQ(four->rope.original_max_position, 64U);
  EXPECT_EQ(four->bos_id, 0U);
  EXPECT_TRUE(four->tie_word_embeddings);
}

TEST(ModelConfigTest, WhatIsAbsentIsDerived) {
  json config = Version4();
  for (const char* field :
       {"num_key_value_heads", "rope_scaling", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "torch_dtype", "architectures", "hidden_act"}) {
    config.erase(field);
  }
  const auto parsed = Parse(config);
  ASSERT_TRUE(parsed) << parsed.error().ToString();
  EXPECT_EQ(parsed->architecture, "LlamaForCausalLM");
  EXPECT_EQ(parsed->num_kv_heads, 4U);
  EXPECT_EQ(parsed->head_dim, 8U);
  EXPECT_EQ(parsed->rope, RopeConfig());
  EXPECT_EQ(parsed->rms_norm_eps, 1e-6);
  EXPECT_FALSE(parsed->tie_word_embeddings);
  EXPECT_FALSE(parsed->bos_id.has_value());
  EXPECT_TRUE(parsed->eos_ids.empty());
}

TEST(ModelConfigTest, HeadDimNeedNotFillTheHiddenSize) {
  json config = Version4();
  config["head_dim"] = 24;
  EXPECT_EQ(Parse(config)->head_dim, 24U);
}

TEST(ModelConfigTest, EosIdsOfBothFilesCount) {
  json config = Version4();
  config["eos_token_id"] = {5, 1};
  const auto parsed = Parse(config, R"({"eos_token_id": [7, 5]})");
  ASSERT_TRUE(parsed);
  EXPECT_THAT(parsed->eos_ids, testing::ElementsAre(1, 5, 7));
  EXPECT_EQ(parsed->Canonical(), Parse(Version4())->Canonical());
}

struct Refusal {
  const char* pointer;  // where the value is put
  json value;
  const char* field;  // what the message names
};

class RefusalTest : public testing::TestWithParam<Refusal> {};

TEST_P(RefusalTest, NamesFieldAndValue) {
  json config = Version4();
  config[json::json_pointer(GetParam().pointer)] = GetParam().value;
  const auto parsed = Parse(config);
  ASSERT_FALSE(parsed);
  EXPECT_EQ(parsed.error().code(), Code::kInvalidArgument);
  EXPECT_THAT(parsed.error().message(), HasSubstr(GetParam().field));
  EXPECT_THAT(parsed.error().message(), HasSubstr(GetParam().value.dump()));
}

INSTANTIATE_TEST_SUITE_P(
    Fields, RefusalTest,
    testing::Values(
        Refusal{"/hidden_act", "gelu", "hidden_act"},
        Refusal{"/attention_bias", true, "attention_bias"}, Refusal{"/mlp_bias", true, "mlp_bias"},
        Refusal{"/sliding_window", 4096, "sliding_window"},
        Refusal{"/quantization_config", {{"bits", 4}}, "quantization_config"},
        Refusal{"/partial_rotary_factor", 0.5, "partial_rotary_factor"},
        Refusal{"/layer_types", {"sliding_attention"}, "layer_types"},
        Refusal{"/torch_dtype", "float8_e4m3fn", "torch_dtype"},
        Refusal{"/rope_scaling/rope_type", "yarn", "rope_type"},
        Refusal{"/rope_scaling/mrope_section", {1, 2}, "mrope_section"},
        Refusal{"/rope_scaling/factor", "eight", "factor"},
        Refusal{"/rope_scaling/high_freq_factor", 0.5, "high_freq_factor"},
        Refusal{"/rope_scaling/rope_theta", 10000.0, "rope_theta"},
        Refusal{"/rope_scaling", "llama3", "rope_scaling"},
        Refusal{"/num_key_value_heads", 3, "num_key_value_heads"},
        Refusal{"/num_attention_heads", 0, "num_attention_heads"},
        Refusal{"/num_hidden_layers", 256, "num_hidden_layers"},
        Refusal{"/hidden_size", -32, "hidden_size"}, Refusal{"/hidden_size", 32.5, "hidden_size"},
        Refusal{"/hidden_size", 30, "head_dim"}, Refusal{"/vocab_size", "96", "vocab_size"},
        Refusal{"/head_dim", 7, "head_dim"}, Refusal{"/rms_norm_eps", 0, "rms_norm_eps"},
        Refusal{"/bos_token_id", 96, "bos_token_id"},
        Refusal{"/eos_token_id", {1, -1}, "eos_token_id"},
        Refusal{"/architectures", {"A", "B"}, "architectures"},
        Refusal{"/tie_word_embeddings", 1, "tie_word_embeddings"}),
    [](const auto& info) { return "Case" + std::to_string(info.index); });

TEST(ModelConfigTest, DamagedFilesAreRefused) {
  EXPECT_THAT(ParseModelConfig("{", "x/config.json", "").error().message(), HasSubstr("x/config"));
  EXPECT_THAT(ParseModelConfig("[]", "x", "").error().message(), HasSubstr("not a JSON object"));
  const std::string deep = "{\"a\":" + std::string(100'000, '[');
  EXPECT_THAT(ParseModelConfig(deep, "x", "").error().message(), HasSubstr("nested"));
  EXPECT_EQ(LoadModelConfig("/does/not/exist").error().code(), Code::kNotFound);
}

TEST(ModelConfigTest, AnUnknownArchitectureIsRefusedWithTheKnownOnes) {
  json config = Version4();
  config["architectures"] = {"MixtralForCausalLM"};
  const Status error = FindArchitecture(*Parse(config)).error();
  EXPECT_EQ(error.code(), Code::kInvalidArgument);
  EXPECT_THAT(error.message(), HasSubstr("MixtralForCausalLM"));
  EXPECT_THAT(error.message(), HasSubstr("LlamaForCausalLM"));
}

TEST(ModelConfigTest, TensorParallelMustFitTheHeads) {
  const ModelConfig config = *Parse(Version4());  // 4 query heads, 2 KV heads, 64 wide
  for (const uint32_t tp : {1U, 2U, 4U}) EXPECT_TRUE(CheckTensorParallel(config, tp).ok()) << tp;
  for (const uint32_t tp : {3U, 8U}) {
    const Status error = CheckTensorParallel(config, tp);
    EXPECT_EQ(error.code(), Code::kInvalidArgument);
    EXPECT_THAT(error.message(), HasSubstr("tp = " + std::to_string(tp)));
    EXPECT_THAT(error.message(), HasSubstr("num_attention_heads = 4"));
  }
  ModelConfig six = config;
  six.num_heads = 12;
  six.num_kv_heads = 4;
  six.intermediate_size = 66;
  EXPECT_THAT(CheckTensorParallel(six, 6).message(), HasSubstr("num_key_value_heads = 4"));
  EXPECT_THAT(CheckTensorParallel(six, 4).message(), HasSubstr("intermediate_size = 66"));
}

}  // namespace
}  // namespace kvrelay::engine
