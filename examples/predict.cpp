// Find segments with an exported file of contents "result", task panoptic, in an image that is not larger than its input.
//
//   maskwright export nuclei nuclei.onnx --contents result
//   g++ -std=c++17 predict.cpp -I$ONNXRUNTIME/include -L$ONNXRUNTIME/lib -lonnxruntime -o predict
//   LD_LIBRARY_PATH=$ONNXRUNTIME/lib ./predict nuclei.onnx cells.ppm
//
// $ONNXRUNTIME is a release of ONNX Runtime for C++ (headers and library), 1.12 or newer. `convert cells.png cells.ppm`
// makes the image.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

struct Image {
    int64_t height, width;
    std::vector<unsigned char> pixels;  // RGB, row by row
};

Image read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    int64_t width = 0, height = 0, largest = 0;
    file >> magic >> width >> height >> largest;
    file.get();
    if (magic != "P6" || largest != 255) throw std::runtime_error(path + ": not a binary PPM with 8 bits");
    Image image{height, width, std::vector<unsigned char>(height * width * 3)};
    file.read(reinterpret_cast<char*>(image.pixels.data()), image.pixels.size());
    if (!file) throw std::runtime_error(path + ": truncated");
    return image;
}

// The metadata is JSON with one space after each colon. A program that has a JSON library uses that instead.
std::vector<float> pixel_mean(const std::string& metadata) {
    size_t start = metadata.find("\"pixel_mean\": [") + 15;
    std::vector<float> mean;
    for (size_t used; mean.size() < 3; start += used + 1) mean.push_back(std::stof(metadata.substr(start), &used));
    return mean;
}

std::vector<std::string> class_names(const std::string& metadata) {
    std::vector<std::string> names;
    const std::string key = "\"name\": \"";
    size_t end = metadata.find("\"evaluate\": {");
    for (size_t at = metadata.find("\"categories\": ["); (at = metadata.find(key, at)) < end;) {
        at += key.size();
        names.push_back(metadata.substr(at, metadata.find('"', at) - at));
    }
    return names;
}

int main(int argc, char** argv) try {
    if (argc != 3) throw std::runtime_error("usage: predict MODEL.onnx IMAGE.ppm");
    Ort::Env environment(ORT_LOGGING_LEVEL_WARNING);
    Ort::Session session(environment, argv[1], Ort::SessionOptions());
    Ort::AllocatorWithDefaultOptions allocator;
    auto text = session.GetModelMetadata().LookupCustomMetadataMapAllocated("maskwright", allocator);
    if (!text) throw std::runtime_error("the model has no metadata of maskwright");
    const std::string metadata = text.get();
    const auto names = class_names(metadata);
    const auto mean = pixel_mean(metadata);

    auto input_type = session.GetInputTypeInfo(0);
    auto shape = input_type.GetTensorTypeAndShapeInfo().GetShape();  // batch, 3, height, width
    const int64_t height = shape[2], width = shape[3];
    const Image image = read_ppm(argv[2]);
    if (image.height > height || image.width > width) throw std::runtime_error("resize the image to fit the input");

    std::vector<float> values(3 * height * width);
    for (int64_t channel = 0; channel < 3; ++channel)
        for (int64_t y = 0; y < height; ++y)
            for (int64_t x = 0; x < width; ++x)
                values[(channel * height + y) * width + x] = y < image.height && x < image.width
                    ? image.pixels[(y * image.width + x) * 3 + channel]
                    : mean[channel];  // padding

    const std::vector<int64_t> size{1, 3, height, width};
    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto images = Ort::Value::CreateTensor<float>(memory, values.data(), values.size(), size.data(), size.size());
    const char* inputs[] = {"images"};
    const char* outputs[] = {"segment_map", "labels", "scores"};
    auto found = session.Run(Ort::RunOptions(), inputs, &images, 1, outputs, 3);
    const int32_t* segment_map = found[0].GetTensorData<int32_t>();
    const int32_t* labels = found[1].GetTensorData<int32_t>();
    const float* scores = found[2].GetTensorData<float>();

    std::vector<int64_t> areas(found[1].GetTensorTypeAndShapeInfo().GetElementCount() + 1);
    for (int64_t y = 0; y < image.height; ++y)
        for (int64_t x = 0; x < image.width; ++x) ++areas[segment_map[y * width + x]];
    for (size_t number = 1; number < areas.size() && labels[number - 1] >= 0; ++number)  // 0 is no segment
        std::cout << names.at(labels[number - 1]) << ' ' << scores[number - 1] << ' ' << areas[number] << " pixels\n";
    return 0;
} catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
}
