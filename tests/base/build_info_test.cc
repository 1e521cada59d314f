#include "base/build_info.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvrelay {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(BuildInfo, VersionTextNamesWhatWasFound) {
  const std::string text = VersionText();
  EXPECT_THAT(text, StartsWith("kvrelay 0.1.0 ("));
  EXPECT_THAT(text, HasSubstr("\nUCX: 1."));
  EXPECT_THAT(text, HasSubstr("\nZeroMQ: 4."));
  EXPECT_THAT(text, HasSubstr("\nCUDA: "));
  EXPECT_EQ(text.back(), '\n');
}

TEST(BuildInfo, CudaIsOffOrAVersion) {
  const std::string cuda(GetBuildInfo().cuda_version);
  EXPECT_TRUE(cuda.starts_with("off") || cuda.find('.') != std::string::npos) << cuda;
}

}  // namespace
}  // namespace kvrelay
