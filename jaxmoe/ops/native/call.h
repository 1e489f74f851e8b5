// A minimal wrapper of XLA's foreign function interface (FFI). It uses the C header only: these kernels are compiled on
// the user's machine, and the C++ header takes several seconds to compile.

#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <utility>

#include "xla/ffi/api/c_api.h"

namespace jaxmoe {

constexpr XLA_FFI_DataType kFloat32 = XLA_FFI_DataType_F32, kBfloat16 = XLA_FFI_DataType_BF16;

// An array argument or result.
struct Array {
  const XLA_FFI_Buffer* buffer;

  XLA_FFI_DataType Kind() const { return buffer->dtype; }
  int64_t Size(int64_t dim) const { return buffer->dims[dim]; }
  // Returns the stride of a dim in elements.
  int64_t Stride(int64_t dim) const {
    int64_t count = 1;
    for (int64_t inner = dim + 1; inner < buffer->rank; ++inner) count *= buffer->dims[inner];
    return count;
  }
  template <typename T>
  T* As() const {
    return static_cast<T*>(buffer->data);
  }
};

// XLA's thread pool.
class Threads {
 public:
  Threads(const XLA_FFI_CallFrame* frame) : api_(frame->api), context_(frame->ctx) {}

  int64_t Count() const {
    int64_t count = 0;
    XLA_FFI_ThreadPool_NumThreads_Args args{};
    args.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE;
    args.ctx = context_;
    args.num_threads = &count;
    Forget(api_->XLA_FFI_ThreadPool_NumThreads(&args));
    return count > 1 ? count : 1;
  }

  // Runs task on a thread of the pool, or on this thread if scheduling fails.
  void Schedule(std::function<void()> task) const {
    auto* kept = new std::function<void()>(std::move(task));
    XLA_FFI_ThreadPool_Schedule_Args args{};
    args.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE;
    args.ctx = context_;
    args.task = [](void* data) {
      auto* task = static_cast<std::function<void()>*>(data);
      (*task)();
      delete task;
    };
    args.data = kept;
    if (Forget(api_->XLA_FFI_ThreadPool_Schedule(&args))) args.task(kept);
  }

 private:
  bool Forget(XLA_FFI_Error* error) const {
    if (error == nullptr) return false;
    XLA_FFI_Error_Destroy_Args args{};
    args.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
    args.error = error;
    api_->XLA_FFI_Error_Destroy(&args);
    return true;
  }

  const XLA_FFI_Api* api_;
  decltype(XLA_FFI_CallFrame::ctx) context_;
};

// The arguments, results and attributes of one kernel call.
struct Call {
  XLA_FFI_CallFrame* frame;

  Array Argument(int64_t index) const { return {static_cast<const XLA_FFI_Buffer*>(frame->args.args[index])}; }
  Array Result(int64_t index = 0) const { return {static_cast<const XLA_FFI_Buffer*>(frame->rets.rets[index])}; }
  Threads Pool() const { return Threads(frame); }

  // Returns the scalar attribute of this name, or zero if it is missing.
  template <typename T>
  T Attribute(const char* name) const {
    for (int64_t i = 0; i < frame->attrs.size; ++i) {
      const XLA_FFI_ByteSpan* found = frame->attrs.names[i];
      if (found->len == std::strlen(name) && std::memcmp(found->ptr, name, found->len) == 0)
        return *static_cast<const T*>(static_cast<const XLA_FFI_Scalar*>(frame->attrs.attrs[i])->value);
    }
    return T{};
  }

  XLA_FFI_Error* Refuse(const char* message) const {
    XLA_FFI_Error_Create_Args args{};
    args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
    args.message = message;
    args.errc = XLA_FFI_Error_Code_INVALID_ARGUMENT;
    return frame->api->XLA_FFI_Error_Create(&args);
  }
};

// Handles a call: reports the FFI version if XLA asks for metadata, else runs the kernel.
inline XLA_FFI_Error* Handle(XLA_FFI_CallFrame* frame, int64_t num_arguments, int64_t num_results,
                             XLA_FFI_Error* (*kernel)(const Call&)) {
  const Call call{frame};
  if (frame->extension_start != nullptr && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    metadata->api_version = XLA_FFI_Api_Version{};
    metadata->api_version.struct_size = XLA_FFI_Api_Version_STRUCT_SIZE;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = 0;
    metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
    return nullptr;
  }
  if (frame->stage != XLA_FFI_ExecutionStage_EXECUTE || frame->args.size != num_arguments ||
      frame->rets.size != num_results)
    return call.Refuse("a native kernel was called with the wrong number of arguments or results");
  try {
    return kernel(call);
  } catch (const std::bad_alloc&) {  // exceptions must not propagate into XLA
    return call.Refuse("a native kernel could not allocate memory");
  }
}

}  // namespace jaxmoe

#define JAXMOE_KERNEL(Name, num_arguments, num_results, kernel)                    \
  extern "C" XLA_FFI_Error* Name(XLA_FFI_CallFrame* frame) {                       \
    return jaxmoe::Handle(frame, num_arguments, num_results, kernel);              \
  }
