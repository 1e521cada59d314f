#include "engine/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>

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
        Refusal{"/attention_bias", 1, "attention_bias"}, Refusal{"/mlp_bias", "yes", "mlp_bias"},
        Refusal{"/sliding_window", 4096, "sliding_window"},
        Refusal{"/quantization_config", {{"bits", 4}}, "quantization_config"},
        Refusal{"/partial_rotary_factor", 0.5, "partial_rotary_factor"},
        Refusal{"/layer_types", {"sliding_attention"}, "layer_types"},
        Refusal{"/layer_types", {"full_attention", "sliding_attention"}, "layer_types"},
        Refusal{"/layer_types", "full_attention", "layer_types"},
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

// --- The other members of the family.

json Member(const char* architecture, const char* model_type) {
  json config = Version4();
  config["architectures"] = {architecture};
  config["model_type"] = model_type;
  return config;
}
json Mistral() {
  json config = Member("MistralForCausalLM", "mistral");
  config["sliding_window"] = 24;
  return config;
}
json Qwen2() {
  json config = Member("Qwen2ForCausalLM", "qwen2");
  config.update({{"use_sliding_window", true}, {"sliding_window", 20}, {"max_window_layers", 1}});
  return config;
}
json Qwen3() {
  json config = Qwen2();
  config.update({{"architectures", {"Qwen3ForCausalLM"}}, {"model_type", "qwen3"}});
  config["head_dim"] = 16;
  return config;
}

using testing::ElementsAre;
using testing::IsEmpty;

TEST(ModelConfigTest, LlamaBiasesAreSwitches) {
  json config = Version4();
  config["attention_bias"] = true;
  EXPECT_TRUE(Parse(config)->qkv_bias && Parse(config)->o_bias && !Parse(config)->mlp_bias);
  config["attention_bias"] = false;
  config["mlp_bias"] = true;
  EXPECT_TRUE(!Parse(config)->qkv_bias && !Parse(config)->o_bias && Parse(config)->mlp_bias);
}

TEST(ModelConfigTest, MistralHasItsWindowOnAllLayers) {
  json config = Mistral();
  EXPECT_THAT(Parse(config)->windows, ElementsAre(24, 24));
  EXPECT_EQ(Parse(config)->window(1), 24U);
  config["sliding_window"] = nullptr;
  EXPECT_THAT(Parse(config)->windows, IsEmpty());
  EXPECT_EQ(Parse(config)->window(1), 0U);
  config["sliding_window"] = 512;  // as long as the context
  EXPECT_THAT(Parse(config)->windows, IsEmpty());
  config.erase("sliding_window");
  config["max_position_embeddings"] = 32768;
  EXPECT_THAT(Parse(config)->windows, ElementsAre(4096, 4096)) << "what an absent field means";
}

TEST(ModelConfigTest, QwenHasItsWindowWhereItSaysSo) {
  for (json config : {Qwen2(), Qwen3()}) {
    EXPECT_THAT(Parse(config)->windows, ElementsAre(0, 20));
    config["layer_types"] = {"sliding_attention", "full_attention"};
    EXPECT_THAT(Parse(config)->windows, ElementsAre(20, 0));
    config["layer_types"] = {"full_attention", "full_attention"};
    EXPECT_THAT(Parse(config)->windows, IsEmpty());
    config.erase("layer_types");
    config.erase("max_window_layers");
    EXPECT_THAT(Parse(config)->windows, IsEmpty()) << "from layer 28 on";
    config["max_window_layers"] = 0;
    config["use_sliding_window"] = false;
    EXPECT_THAT(Parse(config)->windows, IsEmpty());
  }
}

TEST(ModelConfigTest, QwenBiasesAndNorms) {
  json config = Qwen2();
  for (const bool said : {false, true}) {
    config["attention_bias"] = said;  // not read
    EXPECT_TRUE(Parse(config)->qkv_bias && !Parse(config)->o_bias && !Parse(config)->qk_norm);
  }
  config = Qwen3();
  EXPECT_TRUE(!Parse(config)->qkv_bias && !Parse(config)->o_bias && Parse(config)->qk_norm);
  config["attention_bias"] = true;
  EXPECT_TRUE(Parse(config)->qkv_bias && Parse(config)->o_bias);
}

TEST(ModelConfigTest, MembersHaveDefaultsOfTheirOwn) {
  json config = Qwen3();
  config.erase("head_dim");
  EXPECT_EQ(Parse(config)->head_dim, 128U);
  config = Qwen2();
  EXPECT_EQ(Parse(config)->head_dim, 8U);
  config.erase("num_key_value_heads");
  EXPECT_THAT(Parse(config).error().message(), HasSubstr("means 32")) << "there are 4 heads";
  config["num_key_value_heads"] = nullptr;
  EXPECT_EQ(Parse(config)->num_kv_heads, 4U);
  config.update({{"num_attention_heads", 32}, {"hidden_size", 64}});
  config.erase("num_key_value_heads");
  EXPECT_EQ(Parse(config)->num_kv_heads, 32U);
}

TEST(ModelConfigTest, TheTypeAloneNamesTheArchitecture) {
  for (json config : {Mistral(), Qwen2(), Qwen3()}) {
    const ModelConfig both = *Parse(config);
    EXPECT_TRUE(FindArchitecture(both)) << both.architecture;
    config.erase("architectures");
    EXPECT_EQ(*Parse(config), both);
  }
}

TEST(ModelConfigTest, MembersRefuseWhatTheyDoNotKnow) {
  const auto refuses = [](json config, const char* field, const json& value) {
    config[field] = value;
    const auto parsed = Parse(config);
    ASSERT_FALSE(parsed) << config["model_type"] << ": " << field;
    EXPECT_THAT(parsed.error().message(), HasSubstr(field));
    EXPECT_THAT(parsed.error().message(), HasSubstr(value.dump()));
  };
  refuses(Mistral(), "attention_bias", true);
  for (const json& config : {Mistral(), Qwen2(), Qwen3()}) {
    refuses(config, "mlp_bias", true);
    refuses(config, "sliding_window", 0);
    refuses(config, "sliding_window", "24");
    refuses(config, "use_sliding_window", 1);
    refuses(config, "layer_types", {"full_attention"});
    refuses(config, "layer_types", {"full_attention", "chunked_attention"});
  }
  refuses(Mistral(), "layer_types", {"full_attention", "sliding_attention"});
  json none = Qwen2();
  none["use_sliding_window"] = false;
  refuses(none, "layer_types", {"full_attention", "sliding_attention"});
}

json DeepseekV2() {
  json config = Version4();
  config.update({{"architectures", {"DeepseekV2ForCausalLM"}},
                 {"model_type", "deepseek_v2"},
                 {"num_key_value_heads", 4},
                 {"first_k_dense_replace", 2},
                 {"q_lora_rank", 20},
                 {"kv_lora_rank", 24},
                 {"qk_nope_head_dim", 12},
                 {"qk_rope_head_dim", 8},
                 {"v_head_dim", 10}});
  config.erase("rope_scaling");
  return config;
}

TEST(ModelConfigTest, LatentAttentionIsOneHeadOfTheCachesRow) {
  const auto config = Parse(DeepseekV2());
  ASSERT_TRUE(config) << config.error().ToString();
  EXPECT_EQ(config->mla, (MlaConfig{20, 24, 12, 8, 10}));
  EXPECT_EQ(config->num_kv_heads, 1U);
  EXPECT_EQ(config->head_dim, 32U) << "24 of the latent, 8 with the position";
  EXPECT_EQ(config->rope_dim(), 8U);
  EXPECT_TRUE(FindArchitecture(*config));
  EXPECT_TRUE(CheckTensorParallel(*config, 4).ok()) << "the latent is on each rank";
}

TEST(ModelConfigTest, LatentAttentionHasDefaultsOfItsOwn) {
  json config = DeepseekV2();
  config["q_lora_rank"] = nullptr;
  EXPECT_EQ(Parse(config)->mla->q_lora_rank, 0U);
  for (const char* field : {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
                            "v_head_dim", "num_key_value_heads", "architectures"}) {
    config.erase(field);
  }
  EXPECT_EQ(Parse(config)->mla, (MlaConfig{1536, 512, 128, 64, 128}));
}

TEST(ModelConfigTest, LatentAttentionRefusesWhatItDoesNotKnow) {
  const auto refuses = [](const char* field, const json& value) {
    json config = DeepseekV2();
    config[field] = value;
    const auto parsed = Parse(config);
    ASSERT_FALSE(parsed) << field << " = " << value;
    EXPECT_THAT(parsed.error().message(), HasSubstr(field));
  };
  refuses("first_k_dense_replace", 1);
  refuses("first_k_dense_replace", nullptr);
  refuses("num_key_value_heads", 2);
  refuses("qk_rope_head_dim", 7);
  refuses("kv_lora_rank", 0);
  refuses("attention_bias", true);
  refuses("mlp_bias", true);
  refuses("rope_scaling", {{"type", "yarn"}, {"factor", 40}});
}

TEST(ModelConfigTest, WhatChangesTheArithmeticChangesTheName) {
  std::vector<json> configs = {Version4(), Mistral(), Qwen2(), Qwen3()};
  for (const char* field : {"attention_bias", "mlp_bias"}) {
    configs.push_back(Version4());
    configs.back()[field] = true;
  }
  configs.push_back(Mistral());
  configs.back()["sliding_window"] = 25;
  configs.push_back(Qwen2());
  configs.back()["max_window_layers"] = 0;
  std::set<std::string> names;
  for (const json& config : configs) names.insert(Parse(config)->Canonical());
  EXPECT_EQ(names.size(), configs.size());
}

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
