# docker build -t vdrop . && docker run --rm -v "$PWD/outputs:/vdrop/outputs" vdrop
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git && rm -rf /var/lib/apt/lists/*
WORKDIR /vdrop
COPY . .
RUN make setup
CMD ["make", "demo"]
