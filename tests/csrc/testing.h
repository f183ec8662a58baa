// CHECK(condition) for the test programs: on failure, prints the condition and `current_case`, and exits.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

inline std::string current_case;  // description of the case under test

#define CHECK(condition)                                                                           \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      std::fprintf(stderr, "%s:%d: %s\n%s\n", __FILE__, __LINE__, #condition, current_case.c_str()); \
      std::exit(1);                                                                                \
    }                                                                                              \
  } while (false)
