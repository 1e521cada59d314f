#include <gtest/gtest.h>

#include <csignal>

#include "tests/transport/child.h"

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  if (const int code = kvrelay::transport::RunChild(argc, argv); code >= 0) return code;
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
