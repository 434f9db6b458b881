// One instruction set for a whole file, without a compiler flag for it: a flag would reach headers
// whose functions the linker then shares with the rest of the library.

#pragma once

#define FASTDDIM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTDDIM_TARGET_BEGIN(features) \
  FASTDDIM_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FASTDDIM_TARGET_END _Pragma("clang attribute pop")
#else
#define FASTDDIM_TARGET_BEGIN(features) \
  _Pragma("GCC push_options") FASTDDIM_PRAGMA(GCC target(features))
#define FASTDDIM_TARGET_END _Pragma("GCC pop_options")
#endif
