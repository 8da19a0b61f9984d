// The vocabulary of validate.cpp: expected shapes and the first failed check of a call.
#pragma once

#include <cstdio>
#include <initializer_list>

#include "validate.h"

namespace based {

constexpr int64_t kAny = -1;

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kFloat64:
      return "float64";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kOther:
      break;
  }
  return "another dtype";
}

inline bool is_float(DType dtype) { return dtype <= DType::kFloat64; }

inline bool is_index(DType dtype) { return dtype == DType::kInt32 || dtype == DType::kInt64; }

inline DType accumulator(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

struct Text {
  char chars[160] = "(";
  int length = 1;

  void append(const char* format, long long value) {
    if (length < static_cast<int>(sizeof chars)) {
      length += std::snprintf(chars + length, sizeof chars - length, format, value);
    }
  }
};

inline Text shape_text(const int64_t* size, int rank) {
  Text text;
  for (int i = 0; i < rank; ++i) {
    if (i > 0) text.append(", ", 0);
    if (i == kMaxRank) return text.append("...)", 0), text;
    text.append(size[i] == kAny ? "*" : "%lld", size[i]);
  }
  text.append(rank == 1 ? ",)" : ")", 0);
  return text;
}

inline Text device_text(Device device) {
  Text text;
  text.length = 0;
  const char* formats[] = {"cpu", "cuda:%lld", "another device"};
  text.append(formats[static_cast<int>(device.type)], device.index);
  return text;
}

struct Shape {
  int64_t size[kMaxRank] = {};
  int rank = 0;

  Shape(std::initializer_list<int64_t> sizes) {
    for (int64_t s : sizes) size[rank++] = s;
  }
  // The leading sizes of a view, with another last one.
  Shape(const TensorView& like, int64_t last) {
    for (; rank < like.rank - 1; ++rank) size[rank] = like.size[rank];
    size[rank++] = last;
  }
};

// Collects the first failure of one op's checks; later checks are skipped.
class Checker {
 public:
  Checker(const char* op, const TensorView& first, const char* first_name)
      : op_(op), first_(first), first_name_(first_name) {}

  // The arguments from here on are one of several of that name.
  void within(const char* list, int64_t i) {
    std::snprintf(of_, sizeof of_, "%s[%lld].", list, static_cast<long long>(i));
  }
  void within_none() { of_[0] = 0; }

  // The tensor that fixes dtype and device of the call.
  void first(const char* layout, const Shape& shape) {
    if (first_.rank >= 0 && !is_float(first_.dtype)) {
      fail(first_name_, "float32, bfloat16, float16 or float64", name(first_.dtype));
    }
    if (first_.device.type == DeviceType::kCuda && first_.dtype == DType::kFloat64) {
      fail(first_name_, "float32, bfloat16 or float16 on CUDA", "float64");
    }
    tensor(first_name_, first_, first_.dtype, layout, shape);
  }

  // A tensor of the call's dtype.
  void same(const char* argument, const TensorView& view, const char* layout, const Shape& shape) {
    tensor(argument, view, first_.dtype, layout, shape);
  }

  // A state: float32, or float64 in a float64 call.
  void wide(const char* argument, const TensorView& view, const char* layout, const Shape& shape) {
    tensor(argument, view, accumulator(first_.dtype), layout, shape);
  }

  void index(const char* argument, const TensorView& view, const char* layout, const Shape& shape) {
    if (status_.ok() && !is_index(view.dtype)) fail(argument, "int32 or int64", name(view.dtype));
    tensor(argument, view, view.dtype, layout, shape);
  }

  void require(bool condition, const char* argument, const char* expected, double got) {
    if (condition || !status_.ok()) return;
    char text[32];
    std::snprintf(text, sizeof text, "%g", got);
    fail(argument, expected, text);
  }

  // Both tensors of a state, or neither.
  void together(const char* argument, const TensorView& view, const TensorView& with) {
    if (status_.ok() && (view.rank >= 0) != (with.rank >= 0)) {
      fail(argument, "all tensors of the state, or none", "only some of them");
    }
  }

  void fail(const char* argument, const char* expected, const char* got) {
    if (!status_.ok()) return;
    status_ = make_status(StatusCode::kInvalidArgument, "%s: %s%s: expected %s, got %s", op_, of_,
                          argument, expected, got);
  }

  // False once a check failed: sizes read from later views may then be meaningless.
  bool ok() const { return status_.ok(); }
  Status status() const { return status_; }

 private:
  void tensor(const char* argument, const TensorView& view, DType dtype, const char* layout,
              const Shape& shape) {
    if (!status_.ok()) return;
    if (view.rank < 0) return fail(argument, layout, "no tensor");
    const int rank = shape.rank;
    bool matches = view.rank == rank;
    for (int i = 0; matches && i < rank; ++i) {
      matches = shape.size[i] == kAny || shape.size[i] == view.size[i];
    }
    if (!matches) {
      char expected[256];
      std::snprintf(expected, sizeof expected, "shape %s = %s", layout,
                    shape_text(shape.size, rank).chars);
      return fail(argument, expected, shape_text(view.size, view.rank).chars);
    }
    if (view.dtype != dtype) {
      char expected[256];
      std::snprintf(expected, sizeof expected, "dtype %s (%s is %s)", name(dtype), first_name_,
                    name(first_.dtype));
      return fail(argument, expected, name(view.dtype));
    }
    if (view.device.type != first_.device.type || view.device.index != first_.device.index) {
      char expected[256];
      std::snprintf(expected, sizeof expected, "device %s as %s", device_text(first_.device).chars,
                    first_name_);
      return fail(argument, expected, device_text(view.device).chars);
    }
    if (rank > 0 && view.stride[rank - 1] != 1 && view.size[rank - 1] > 1) {
      char got[32];
      std::snprintf(got, sizeof got, "stride %lld", static_cast<long long>(view.stride[rank - 1]));
      fail(argument, "a contiguous last dimension", got);
    }
  }

  const char* op_;
  char of_[24] = "";  // what the arguments' names begin with
  const TensorView& first_;
  const char* first_name_;
  Status status_;
};

inline bool given(const TensorView& view) { return view.rank >= 0; }

}  // namespace based
