#include "attention/backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvrelay::attention {
namespace {

using testing::HasSubstr;

BackendRequest Plain() {
  return {.head_dim = 128,
          .query_heads = 32,
          .kv_heads = 8,
          .cache_dtype = DType::kBf16,
          .block_size = 16};
}

TEST(GetAttnBackend, PrefersRelay) {
  const auto choice = GetAttnBackend(Plain());
  ASSERT_TRUE(choice.has_value()) << choice.error().ToString();
  EXPECT_EQ(choice->backend, Backend::kRelay);
  EXPECT_THAT(choice->why, HasSubstr("best of 3, bf16 cache"));
  ASSERT_EQ(choice->rejected.size(), 1U);
  EXPECT_EQ(choice->rejected[0].why, "serves MLA only");
}

TEST(GetAttnBackend, SaysWhyRelayWasRejected) {
  BackendRequest request = Plain();
  request.relay_enabled = false;
  const auto choice = GetAttnBackend(request);
  ASSERT_TRUE(choice.has_value()) << choice.error().ToString();
  EXPECT_EQ(choice->backend, Backend::kPaged);
  EXPECT_THAT(choice->ToString(), HasSubstr("relay_attn: disabled"));
}

TEST(GetAttnBackend, TheWantedOneOverrides) {
  BackendRequest request = Plain();
  request.wanted = "naive_attn";
  const auto choice = GetAttnBackend(request);
  ASSERT_TRUE(choice.has_value()) << choice.error().ToString();
  EXPECT_EQ(choice->backend, Backend::kNaive);
  EXPECT_THAT(choice->why, HasSubstr("asked for"));
}

TEST(GetAttnBackend, AWantedOneThatCannotServeIsAnError) {
  BackendRequest request = Plain();
  request.wanted = "relay_attn";
  request.relay_enabled = false;
  const auto choice = GetAttnBackend(request);
  ASSERT_FALSE(choice.has_value());
  EXPECT_EQ(choice.error().code(), Code::kIncompatible);
  EXPECT_THAT(choice.error().message(), HasSubstr("relay_attn: disabled"));
}

TEST(GetAttnBackend, UnknownNamesListTheKnown) {
  BackendRequest request = Plain();
  request.wanted = "flash_attn";
  const auto choice = GetAttnBackend(request);
  ASSERT_FALSE(choice.has_value());
  EXPECT_EQ(choice.error().code(), Code::kInvalidArgument);
  EXPECT_THAT(choice.error().message(), HasSubstr("mla_attn, relay_attn, paged_attn, naive_attn"));
}

TEST(GetAttnBackend, MlaHasOneLatentHead) {
  BackendRequest request = Plain();
  request.kinds.mla = true;
  const auto refused = GetAttnBackend(request);
  ASSERT_FALSE(refused.has_value());
  EXPECT_EQ(refused.error().code(), Code::kIncompatible);
  EXPECT_THAT(refused.error().message(), HasSubstr("paged_attn: MLA has one latent head, not 8"));
  request.kv_heads = 1;
  const auto choice = GetAttnBackend(request);
  ASSERT_TRUE(choice.has_value()) << choice.error().ToString();
  EXPECT_EQ(choice->backend, Backend::kMla);
  EXPECT_THAT(choice->why, HasSubstr("causal, mla"));
  request.relay_enabled = false;
  EXPECT_EQ(GetAttnBackend(request)->backend, Backend::kMla) << "it does without";
  request.wanted = "paged_attn";
  EXPECT_EQ(GetAttnBackend(request)->backend, Backend::kPaged);
}

TEST(GetAttnBackend, HeadsMustDivide) {
  BackendRequest request = Plain();
  request.query_heads = 20;
  const auto choice = GetAttnBackend(request);
  ASSERT_FALSE(choice.has_value());
  EXPECT_THAT(choice.error().message(), HasSubstr("20 query heads are no multiple of 8 KV heads"));
}

TEST(GetAttnBackend, AllServeWindowsSoftCapsAndBiases) {
  BackendRequest request = Plain();
  request.kinds = {.window = true, .soft_cap = true, .alibi = true};
  const auto choice = GetAttnBackend(request);
  ASSERT_TRUE(choice.has_value()) << choice.error().ToString();
  EXPECT_THAT(choice->why, HasSubstr("best of 3, bf16 cache, causal, window, soft_cap, alibi"));
}

TEST(GetAttnBackend, CachesOfOneByteAreServed) {
  for (const DType dtype : {DType::kFp8E4m3, DType::kFp8E5m2, DType::kInt8}) {
    BackendRequest request = Plain();
    request.cache_dtype = dtype;
    const auto choice = GetAttnBackend(request);
    ASSERT_TRUE(choice.has_value()) << choice.error().ToString();
    EXPECT_THAT(choice->why, HasSubstr(std::string(DTypeName(dtype)) + " cache"));
  }
}

TEST(Backend, TraitsAreInTheOrderOfTheNames) {
  for (const Backend backend : kBackends) EXPECT_EQ(TraitsOf(backend).backend, backend);
}

TEST(Backend, NamesGoBothWays) {
  for (const Backend backend : kBackends) {
    const auto again = BackendFromName(BackendName(backend));
    ASSERT_TRUE(again.has_value());
    EXPECT_EQ(*again, backend);
  }
}

}  // namespace
}  // namespace kvrelay::attention
