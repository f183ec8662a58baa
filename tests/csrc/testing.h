// What the test programs share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

inline std::string where;  // what is being tested, for whoever reads of a failure

#define CHECK(condition)                                                                           \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      std::fprintf(stderr, "%s:%d: %s\n%s\n", __FILE__, __LINE__, #condition, where.c_str());      \
      std::exit(1);                                                                                \
    }                                                                                              \
  } while (false)
